"""A compact schema of what our Kubernetes files use: the fields of KubeRay's `ray.io/v1`, and of pods.

The field names, types and enumerations are those of KubeRay's custom resource definitions and of Kubernetes' core/v1.
Fields that the files do not use are left out, so a new one must be added here first, and looked up.

A schema is a Python type, `{key: schema, …}` for an object whose keys are all named (`!` at the end: required),
`[schema]` for a list, a set for an enumeration, or `Map` for a mapping of text to text.
"""

from typing import Any

Map = "map of text"
Quantity = "quantity"

_CONTAINER = {
    "name!": str,
    "image": str,
    "env": [
        {
            "name!": str,
            "value": str,
            "valueFrom": {"secretKeyRef": {"name": str, "key!": str, "optional": bool}},
        }
    ],
    "resources": {"requests": Quantity, "limits": Quantity},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
_TEMPLATE = {
    "metadata": {"labels": Map, "annotations": Map},
    "spec": {
        "serviceAccountName": str,
        "automountServiceAccountToken": bool,
        "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "seccompProfile": {"type!": str}},
        "nodeSelector": Map,
        "tolerations": [{"key": str, "operator": {"Exists", "Equal"}, "value": str, "effect": str}],
        "terminationGracePeriodSeconds": int,
        "containers!": [_CONTAINER],
        "volumes": [{"name!": str, "configMap": {"name": str}}],
    },
}
_CLUSTER_SPEC = {
    "rayVersion": str,
    "authOptions": {"mode": {"disabled", "token"}, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
    },
    "headGroupSpec!": {"serviceType": str, "rayStartParams": Map, "labels": Map, "template!": _TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "idleTimeoutSeconds": int,
            "rayStartParams": Map,
            "labels": Map,
            "template!": _TEMPLATE,
        }
    ],
}
_META = {"name": str, "generateName": str, "namespace": str, "labels": Map}

SCHEMAS: dict[str, Any] = {
    "RayCluster": {"apiVersion!": {"ray.io/v1"}, "kind!": str, "metadata!": _META, "spec!": _CLUSTER_SPEC},
    "RayJob": {
        "apiVersion!": {"ray.io/v1"},
        "kind!": str,
        "metadata!": _META,
        "spec!": {
            "entrypoint": str,
            "backoffLimit": int,
            "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "rayClusterSpec": _CLUSTER_SPEC,
        },
    },
}


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """Return what of a parsed document does not fit a schema, each with its path."""
    if schema in (Map, Quantity):
        if not isinstance(value, dict):
            return [f"{path}: must be a mapping"]
        return [f"{path}.{key}: {item!r} must be text" for key, item in value.items() if not isinstance(item, str)]
    if isinstance(schema, set):
        return [] if value in schema else [f"{path}: {value!r} is none of {sorted(schema)}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: must be a list"]
        return [found for n, item in enumerate(value) for found in problems(item, schema[0], f"{path}[{n}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: must be a mapping"]
        known = {key.rstrip("!"): part for key, part in schema.items()}
        found = [f"{path}.{key}: unknown" for key in value if key not in known]
        found += [f"{path}.{key[:-1]}: missing" for key in schema if key.endswith("!") and key[:-1] not in value]
        return found + [
            problem for key in value if key in known for problem in problems(value[key], known[key], f"{path}.{key}")
        ]
    good = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
    return [] if good else [f"{path}: {value!r} must be {schema.__name__}"]
