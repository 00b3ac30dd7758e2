# The package with all that recipes need. See docs/launch.md.
FROM python:3.12-slim

# torch.compile needs a C compiler
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lightning-hybrid
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lightning_hybrid lightning_hybrid
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt ".[recipes]"

WORKDIR /workspace
CMD ["lightning-hybrid", "doctor"]
