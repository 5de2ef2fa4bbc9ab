# One image for the head, the workers and the submitter of a Ray cluster.
#
#   docker build -t rlgen:0.1.0 .
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /app

# Dependencies are a layer of their own, which changes with these two files only. They go into the
# system's Python: KubeRay may start containers through a login shell, which forgets PATH.
COPY pyproject.toml infra/constraints.txt /tmp/build/
RUN python -c "import tomllib; \
        project = tomllib.load(open('/tmp/build/pyproject.toml', 'rb'))['project']; \
        print('\n'.join(project['dependencies']))" > /tmp/build/requirements.txt \
    && pip install --no-cache-dir -r /tmp/build/requirements.txt -c /tmp/build/constraints.txt \
    && rm -r /tmp/build

COPY pyproject.toml README.md LICENSE /tmp/build/
COPY rlgen /tmp/build/rlgen
RUN pip install --no-cache-dir --no-deps /tmp/build && rm -r /tmp/build

# The user id is the one in the manifests. runs/ is made in the working folder, so it is theirs.
RUN useradd --uid 1000 --create-home rlgen && chown rlgen:rlgen /app
COPY jobs ./jobs
USER 1000:1000

# KubeRay replaces this command by `ray start`.
CMD ["python", "-m", "rlgen.jobs.grpo"]
