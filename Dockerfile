# A Space, or any container: docker build -t trsp-explorer . && docker run -p 8501:8501 trsp-explorer
# On a machine without a GPU pass --build-arg TORCH_INDEX=<PyTorch's index of CPU builds>, which saves gigabytes.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user \
    PATH=/home/user/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /home/user/app

ARG TORCH_INDEX=
COPY --chown=user requirements.txt .
RUN torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.txt) \
    && pip install --no-cache-dir --user ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch" \
    && pip install --no-cache-dir --user -r requirements.txt

COPY --chown=user . .
RUN python -m trsp_core fetch smollm2-135m

EXPOSE 8501
HEALTHCHECK CMD python -c "import urllib.request as u; u.urlopen('http://localhost:8501/_stcore/health')"
CMD ["streamlit", "run", "app.py", "--server.port=8501", "--server.address=0.0.0.0", "--server.headless=true"]
