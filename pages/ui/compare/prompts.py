"""Ready prompts by kind: each shows another side of what a model loses."""

PROMPTS = {
    "Story": "Once upon a time, in a small town by the sea, there lived a clockmaker who",
    "Fact": "The capital of France is Paris. The capital of Japan is",
    "List": "Five things to pack for a hike in the mountains:\n1. Water\n2.",
    "Chat": "Explain in two sentences why the sky is blue.",
    "Code": 'def is_prime(n):\n    """Return True if n is a prime number."""\n',
}
IN_TEMPLATE = ("Chat",)  # kinds that want the chat template
