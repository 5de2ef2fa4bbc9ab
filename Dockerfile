# One image for the head, the workers and the submitter of a Ray cluster, with and without GPUs:
# PyTorch brings CUDA along, and the node brings the driver.
#
#   docker build -t rlgen:0.1.0 .
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The numeric id is the one in the manifests: Kubernetes can't tell whether a name is root. runs/ is
# made in the working folder, so that is theirs.
WORKDIR /app
RUN useradd --uid 1000 --user-group --create-home rlgen && chown 1000:1000 /app

# What changes least comes first. All goes into the system's Python: KubeRay may start containers
# through a login shell, which forgets PATH.
COPY infra/constraints.txt /build/
RUN pip install --no-cache-dir --constraint /build/constraints.txt torch torchvision

COPY pyproject.toml /build/
RUN python -c "import tomllib; \
        project = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
        print('\n'.join(project['dependencies']))" > /build/requirements.txt \
    && pip install --no-cache-dir --constraint /build/constraints.txt \
        --requirement /build/requirements.txt

COPY README.md LICENSE /build/
COPY rlgen /build/rlgen
RUN pip install --no-cache-dir --no-deps --constraint /build/constraints.txt /build

COPY jobs ./jobs
USER 1000:1000

# KubeRay replaces this command by `ray start`.
CMD ["python", "-m", "rlgen.jobs.grpo"]
