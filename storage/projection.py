"""Hidden states in fewer dimensions: a principal component analysis fitted before the capture, kept with the dataset.

It lies at `projections/<digest>.safetensors`; the digest of the file is its name and part of the dataset's identity, so
that rows of different projections never meet. A state x is stored as C·(x − m) and read back as m + Cᵀ·y, with
orthonormal rows C. `loss` is the share of the states' variance that this loses, on states it was not fitted to.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError, IntegrityError
from storage.identity import CaptureIdentity
from storage.info import INFO_KEY, read_info
from storage.object_store import Store

Float32Array = NDArray[np.float32]

PROJECTION_PREFIX = "projections/"
_HELD_OUT_EVERY = 4
"""One state in so many is not fitted to, but measured."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The projections of all layers to one width N."""

    mean: Mapping[str, Float32Array]  # layer → [W]
    components: Mapping[str, Float32Array]  # layer → [N, W], orthonormal rows by falling variance
    loss: Mapping[str, float]  # layer → share of the variance that is lost

    def project(self, layer: str, states: Float32Array) -> Float32Array:
        """Return float32 [P, N] of states [P, W]."""
        return np.asarray((states - self.mean[layer]) @ self.components[layer].T, dtype=np.float32)

    def restore(self, layer: str, projected: Float32Array) -> Float32Array:
        """Return the nearest states [P, W] of projected ones [P, N]."""
        return np.asarray(projected @ self.components[layer] + self.mean[layer], dtype=np.float32)


def fit_projection(states: Mapping[str, Float32Array], width: int) -> Projection:
    """Fit a projection of each layer's states [P, W] to `width` dimensions; the same states give the same one.

    Raises:
        InputError: a layer is not wider than `width`, or there are too few states.
    """
    mean, components, loss = {}, {}, {}
    for layer, values in states.items():
        held_out = np.arange(len(values)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        fitted = values[~held_out].astype(np.float64)
        if values.shape[1] <= width or len(fitted) <= width:
            raise InputError(
                f"cache.hidden_projection {width}: the layer {layer} is {values.shape[1]} wide and the run gives "
                f"{len(fitted)} of its states to fit to; both must be more: lower it, or leave it out"
            )
        mean[layer] = fitted.mean(axis=0).astype(np.float32)
        centred = fitted - mean[layer]
        _, vectors = np.linalg.eigh(centred.T @ centred)
        rows = vectors.T[::-1][:width]
        # Either sign is an eigenvector: the largest value is made positive.
        signs = np.sign(rows[np.arange(width), np.abs(rows).argmax(axis=1)])
        components[layer] = np.ascontiguousarray(rows * signs[:, None], dtype=np.float32)
        rest = values[held_out].astype(np.float64) - mean[layer]
        kept = rest @ components[layer].T.astype(np.float64)
        loss[layer] = float(max(0.0, 1 - (kept**2).sum() / max((rest**2).sum(), 1e-30)))
    return Projection(mean, components, loss)


def save_projection(store: Store, projection: Projection) -> str:
    """Keep a projection in a dataset's store; returns its digest."""
    from safetensors.numpy import save

    tensors = {f"{layer}.mean": values for layer, values in projection.mean.items()}
    tensors |= {f"{layer}.components": values for layer, values in projection.components.items()}
    raw = save(tensors, {"lectern": json.dumps({"loss": dict(projection.loss)}, sort_keys=True)})
    digest = _digest(raw)
    store.create(_key(digest), raw)
    return digest


def load_projection(store: Store, digest: str) -> Projection:
    """Return the projection of a dataset's identity; IntegrityError when it is missing or damaged."""
    from safetensors.numpy import load

    key = _key(digest)
    raw = store.read_if_exists(key)
    if raw is None or _digest(raw) != digest:
        raise IntegrityError(
            f"{store.shown(key)} is {'missing' if raw is None else 'damaged: its digest is not its name'}; without it "
            "the hidden states cannot be read: restore it from a copy, or capture into another URL"
        )
    header: Any = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    loss = json.loads(header["__metadata__"]["lectern"])["loss"]
    tensors = load(raw)
    return Projection(
        mean={layer: tensors[f"{layer}.mean"] for layer in loss},
        components={layer: tensors[f"{layer}.components"] for layer in loss},
        loss=loss,
    )


def with_projection(capture: CaptureIdentity, url: str) -> CaptureIdentity:
    """Return the settings with the projection that the dataset at `url` was begun with, if any of that width.

    Without a dataset there is none yet: it is fitted when the capture begins.
    """
    if capture.hidden_projection is None:
        return capture
    store = Store(url)
    if not store.exists(INFO_KEY):
        return capture
    held = read_info(store).identity.capture
    if held.hidden_projection != capture.hidden_projection:
        return capture
    return capture.model_copy(update={"projection": held.projection})


def _key(digest: str) -> str:
    return f"{PROJECTION_PREFIX}{digest}.safetensors"


def _digest(raw: bytes) -> str:
    return blake2b(raw, digest_size=16, person=b"lectern.project").hexdigest()
