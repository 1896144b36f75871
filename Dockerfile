# syntax=docker/dockerfile:1
# One image for every process of trueup: workers, beat, API, migrations and the command line.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/trueup
WORKDIR /src
# Install the dependencies first, so that a change of the code does not install them again. The lock file has every extra
# except [embedded], because PostgreSQL and Redis run in their own containers.
COPY requirements/main.txt requirements/main.txt
RUN /opt/trueup/bin/pip install --require-hashes --requirement requirements/main.txt
COPY pyproject.toml README.md LICENSE ./
COPY trueup trueup
COPY examples examples
# trueup/cli, trueup/tasks and trueup/worker are links to these.
COPY cli cli
COPY tasks tasks
COPY worker worker
# --no-deps: install only packages that the lock file lists with a hash.
RUN pip wheel --no-deps --wheel-dir /dist . \
    && /opt/trueup/bin/pip install --no-deps --no-index /dist/trueup-*.whl

FROM python:3.13-slim
ENV PATH="/opt/trueup/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    TRUEUP_HOME=/var/lib/trueup
RUN useradd --system --uid 10001 --no-create-home --home-dir /var/lib/trueup trueup \
    && install --directory --owner=trueup --mode=0700 /var/lib/trueup /var/lib/trueup/run
COPY --from=build /opt/trueup /opt/trueup
WORKDIR /var/lib/trueup
USER trueup
# A worker touches a file while it runs. docker-compose.yml has a check for each other process.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD find /var/lib/trueup/run -name '*.alive' -mmin -1 | grep -q .
CMD ["celery", "-A", "trueup.worker", "worker", "-Q", "trueup-ai", "-n", "trueup-ai@%h"]
