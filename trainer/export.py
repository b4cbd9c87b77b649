"""Export of a trained student: `save_pretrained` in safetensors, put in place in one step."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from storage.object_store import Store
from trainer.config import LoraConfig
from trainer.lora import merged

SHARD_SIZE = "2GB"
"""Largest weight file; one is in memory at a time when it is sent to an object store."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def export_model(engine: Any, run_dir: str, name: str, rank: int, lora: LoraConfig | None = None) -> None:
    """Write the student below `<run_dir>/<name>`, its adapters merged, without projectors. Collective under ZeRO-3."""
    weights = None
    if engine.zero_optimization_partition_weights():
        gathered = engine._zero3_consolidated_16bit_state_dict()
        weights = {key.removeprefix("model."): value for key, value in (gathered or {}).items() if _is_model(key)}
    if rank != 0:
        return
    if lora is not None:
        weights = merged(engine.module.model.state_dict() if weights is None else weights, lora)
    store = Store(run_dir)
    parent = Path(store.url) if store.is_local else None
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as scratch:
        engine.module.model.save_pretrained(scratch, state_dict=weights, max_shard_size=SHARD_SIZE)
        _publish(Path(scratch), store, name)


def copy_tokenizer(folder: Path, run_dir: str, name: str) -> None:
    """Put the tokenizer's files beside an exported student."""
    store = Store(run_dir)
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            store.write(f"{name}/{file}", (folder / file).read_bytes())


def name_classes(folder: Path, run_dir: str, name: str) -> None:
    """Call the classes of an exported student what the config of the teacher in `folder` calls them."""
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label")
    if names is None:
        return
    store, key = Store(run_dir), f"{name}/config.json"
    config = json.loads(store.read(key))
    config |= {"id2label": names, "label2id": {label: int(number) for number, label in names.items()}}
    store.write(key, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _publish(scratch: Path, store: Store, name: str) -> None:
    for key in store.list(f"{name}/"):
        store.delete(key)
    if store.is_local:
        target = Path(store.url) / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in scratch.iterdir():
            file.rename(target / file.name)
        return
    for file in sorted(scratch.iterdir()):
        store.write(f"{name}/{file.name}", file.read_bytes())


def _is_model(key: str) -> bool:
    return key.startswith("model.")
