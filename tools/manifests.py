"""Checks the image's files and the Kubernetes manifests by schemas and linters.

python -m tools.manifests [--chart DIR]

--chart is a checkout of the chart of vLLM production-stack (its folder `helm`): our values are
then checked against its schema and rendered by Helm's own library, and what is rendered is checked
like our manifest. Needs the extra `deploy`; none of it is needed to serve.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "deploy" / "kubernetes.yaml"
VALUES = ROOT / "deploy" / "production-stack.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
VERSIONS = ("1.29", "1.32", "1.35")
"""Of Kubernetes."""
NEEDED = ("kubernetes_validate", "helm_python", "compose_spec")


def main() -> None:
    """Exits with 1 and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    linter = shutil.which(
        "hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    if missing or linter is None:
        raise SystemExit(
            f"tools.manifests needs {', '.join([*missing, *([] if linter else ['hadolint'])])}: "
            "pip install 'kvtc-vllm[deploy]'"
        )
    check_objects(list(yaml.safe_load_all(MANIFEST.read_text())), MANIFEST.name)
    if subprocess.run([linter, str(DOCKERFILE)]).returncode:
        raise SystemExit(1)
    print(f"{DOCKERFILE.name}: hadolint finds nothing")
    check_compose()
    if args.chart is not None:
        check_values(args.chart)


def check_objects(objects: list[dict[str, Any]], source: str) -> None:
    """Each Kubernetes object against the strict schema of its kind. Exits with the first error."""
    import kubernetes_validate

    for version in VERSIONS:
        for found in objects:
            try:
                kubernetes_validate.validate(found, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                raise SystemExit(f"{source}, {found['kind']}, {version}: {error}") from error
    kinds = ", ".join(found["kind"] for found in objects)
    print(f"{source}: {kinds} are valid in Kubernetes {', '.join(VERSIONS)}")


def check_compose() -> None:
    """By the Compose specification."""
    from compose_spec import ComposeSpecification

    ComposeSpecification.model_validate(yaml.safe_load(COMPOSE.read_text()))
    print(f"{COMPOSE.name}: valid by the Compose specification")


def check_values(chart: Path) -> None:
    """Our values in the chart's schema and templates. Exits if a word of ours gets lost."""
    from helm_python import Chart

    values = yaml.safe_load(VALUES.read_text())
    # Its dependencies are charts of others, which are not here and have nothing of ours.
    values["kube-prometheus-stack"] = {"enabled": False}
    with Chart.load(str(chart)) as loaded:
        loaded.validate_schema(values)
        print(f"{VALUES.name}: valid by the schema of {loaded.name} {loaded.version}")
        rendered = loaded.render(values, name="kvtc", namespace="default")
    objects = [
        found
        for text in rendered.values()
        for found in yaml.safe_load_all(text)
        if found
        and found["apiVersion"].split("/")[0] in ("v1", "apps", "rbac.authorization.k8s.io")
    ]
    check_objects(objects, f"rendered {VALUES.name}")
    (engine,) = (o for o in objects if o["metadata"]["name"].endswith("-deployment-vllm"))
    pod = engine["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ours = values["servingEngineSpec"]["modelSpec"][0]
    for word in (*ours["vllmConfig"]["extraArgs"], "--enable-prefix-caching"):
        if word not in container["command"]:
            raise SystemExit(f"{VALUES.name}: the chart does not pass {word!r} on")
    if pod["securityContext"] != values["servingEngineSpec"]["securityContext"]:
        raise SystemExit(f"{VALUES.name}: the chart does not pass the security context on")
    mounts = {mount["mountPath"] for mount in pod["initContainers"][0]["volumeMounts"]}
    if mounts != {"/data"}:
        raise SystemExit(f"{VALUES.name}: the init container has {mounts}, not /data")
    print(f"rendered {VALUES.name}: the engine gets our arguments, security context and volume")


if __name__ == "__main__":
    main()
