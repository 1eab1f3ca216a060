# syntax=docker/dockerfile:1
# docker build -t millrace --build-arg TORCH_INDEX=... .   CPU: PyTorch's index of CPU wheels makes it small
# docker build -t millrace --build-arg CUDA=1 .            NVIDIA GPUs: PyTorch's default wheels bring CUDA

FROM node:20-slim AS page
WORKDIR /src/web
COPY web/package.json web/package-lock.json web/.npmrc ./
RUN npm ci --no-audit --no-fund
COPY web ./
RUN npm run build

FROM python:3.12-slim AS build
ARG CUDA=
ARG TORCH_INDEX=
# The CPU kernels are compiled at first start, for the processor that runs them.
WORKDIR /opt/millrace
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
# PyTorch's CUDA wheels name the Triton that they were built with.
RUN test -z "$CUDA" || sed -i '/^triton==/d' constraints.txt
RUN pip install --no-cache-dir torch -c constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}
COPY kernels kernels
COPY engine engine
COPY server server
RUN pip install --no-cache-dir -e ".${CUDA:+[gpu]}" -c constraints.txt

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 millrace
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/millrace /opt/millrace
COPY --from=page /src/web/dist /opt/millrace/web/dist
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MILLRACE_HOST=0.0.0.0 \
    MILLRACE_PORT=8000
USER millrace
WORKDIR /home/millrace
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['MILLRACE_PORT'] + '/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["millrace"]
CMD ["serve"]
