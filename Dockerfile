# A Space, or any container: docker build -t trsp-explorer . && docker run -p 8501:8501 trsp-explorer
# The model is fetched and converted here, so the container needs no network.
# On a machine without a GPU pass --build-arg TORCH_INDEX=<PyTorch's index of CPU builds>, which saves gigabytes.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user && install --directory --owner=user --group=user /home/user/app
USER 1000
# TRSP_DEMO: strangers come here; a list of models, caps, no local paths. See "For strangers" in docs/deploy.md; 0 opens it.
# FORWARDED_ALLOW_IPS: the proxies whose word tells visitors apart; a Space's come from this network.
# hadolint ignore=DL3064
ENV HOME=/home/user \
    PATH=/home/user/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_IMPLICIT_TOKEN=1 \
    FORWARDED_ALLOW_IPS=10.0.0.0/8 \
    TRSP_DEMO=1
WORKDIR /home/user/app

ARG TORCH_INDEX=
COPY --chown=1000:1000 requirements.lock .
# All versions and checksums are in requirements.lock. The files of another index for torch have checksums of their own,
# so torch comes from there alone and unchecked but for TLS, and what only its CUDA build needs is left out.
# hadolint ignore=DL3013
RUN if [ -z "$TORCH_INDEX" ]; then cp requirements.lock wanted.lock; else \
        pip install --no-cache-dir --user --no-deps --index-url "$TORCH_INDEX" "$(grep -o '^torch==[0-9.]*' requirements.lock)" \
        && awk '/^[a-z0-9]/ { cuda = /^(nvidia|cuda|triton)/ } !cuda' requirements.lock > wanted.lock; fi \
    && pip install --no-cache-dir --user --require-hashes -r wanted.lock \
    && rm wanted.lock

COPY --chown=1000:1000 . .
RUN python -m trsp_core fetch smollm2-135m

EXPOSE 8501
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://localhost:8501/_stcore/health', timeout=5)"]
# In the frame of a Space cookies are not kept, so the token against forged uploads never comes back: it is left out.
# What a page of another site writes is turned away by its origin, and there are no accounts to steal behind it.
CMD ["streamlit", "run", "app.py", "--server.port=8501", "--server.address=0.0.0.0", "--server.headless=true", "--server.enableXsrfProtection=false", "--server.maxUploadSize=2", "--server.maxMessageSize=20"]
