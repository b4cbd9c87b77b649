"""One YAML, checked: overrides, and one clear message for each mistake."""

from pathlib import Path
from typing import get_args

import pytest

from cluster.config import RunConfig
from cluster.config_messages import nearest_name
from cluster.loader import apply_override, load_config, parse_yaml
from storage.errors import InputError

YAML = """
data:
  sources:
    - {name: general, path: "embedded:general"}
    - {name: domain, path: "embedded:domain", max_documents: 7}
cache: {url: somewhere}
student: {config: {model_type: qwen2, rms_norm_eps: 1e-6}}
train: {learning_rate: 1e-3}
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return str(file)


def test_defaults_fill_what_the_file_leaves_out(path: str) -> None:
    config = load_config(path)
    assert config.train.steps == 1000
    assert config.data.sources[1].max_documents == 7


def test_numbers_with_an_exponent_but_no_point_are_numbers(path: str) -> None:
    config = load_config(path)
    assert config.train.learning_rate == 1e-3
    assert config.student.config is not None
    assert config.student.config["rms_norm_eps"] == 1e-6


def test_overrides_apply_in_order_and_are_read_as_yaml(path: str) -> None:
    config = load_config(path, ["train.steps=30", "train.steps=40", "curriculum.start={general: 1, domain: 3}"])
    assert config.train.steps == 40
    assert config.curriculum.start == {"general": 1.0, "domain": 3.0}


def test_list_items_are_named_by_index_or_by_name(path: str) -> None:
    config = load_config(path, ["data.sources.domain.max_documents=3", "data.sources.0.clean.nfkc=true"])
    assert config.data.sources[1].max_documents == 3
    assert config.data.sources[0].clean.nfkc


def test_an_override_creates_a_section_that_the_file_leaves_out(path: str) -> None:
    assert load_config(path, ["evaluate.baseline=false"]).evaluate.baseline is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=1"], "unknown key train.stpes; did you mean train.steps?"),
        (["trian.steps=1"], "unknown key trian; did you mean train?"),
        (["top_k=3"], "unknown key top_k; did you mean cache.top_k?"),
        (["data.sources.general.clean.nfkd=true"], "did you mean data.sources.0.clean.nfkc?"),
        (["train.loss.klm=1"], "did you mean train.loss.kl?"),
        (["train.loss.kl=-1"], "train.loss.kl = -1: must be greater than or equal to 0"),
        (["train.loss.kl=abc"], "train.loss.kl = 'abc': must be a number"),
        (["train.loss.kl={shape: linear}"], "train.loss.kl.start is missing"),
        (["train.loss.kl={shape: linear, start: 1, ende: 0}"], "did you mean train.loss.kl.end?"),
        (["train.loss.ce={shape: step, start: 1, begin: 0.9, finish: 0.2}"], "finish 0.2 lies before begin 0.9"),
        (["train.loss.divergence=tvd", "cache.kind=sampled"], "set train.loss.divergence: forward_kl, or capture with"),
        (["train.loss.temperature=2"], "leave it at 1, or set train.loss.exact"),
        (["zzzz=1"], "unknown key zzzz; valid names in the top level: data, teacher, cache"),
        (["train.steps=many"], "train.steps = 'many': must be a whole number"),
        (["train.steps=0"], "train.steps = 0: must be greater than or equal to 1"),
        (
            ["cache.kind=most"],
            "cache.kind = 'most': must be 'topk', 'hybrid', 'hybrid_counts', 'sampled', 'dense' or 'text'",
        ),
        (
            ["train.offload=parameters"],
            "is a part of ZeRO 3 and above, and train.zero_stage is 2; set train.zero_stage: 3",
        ),
        (["train.global_batch_size=7"], "does not split into workers 2 × micro_batch_size 4; use a multiple of 8"),
        (["cache=3"], "cache = 3: must be a section with keys of its own"),
        (["cache.url=null"], "cache.url = None: must be text"),
        (["data.sources.other.name=x"], "no item 'other'; it has general, domain"),
        (["data.sources.general.name=domain"], "holds a name twice"),
        (["train.steps"], "write it as section.key=value"),
        (["=3"], "write it as section.key=value"),
        (["train..steps=3"], "write it as section.key=value"),
        (["cache.url.deep=3"], "it has no keys"),
        (["train=[1"], "--set train: not valid YAML"),
        (["student.config=null"], "exactly one of `path`"),
    ],
)
def test_each_mistake_gets_one_clear_message(path: str, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_several_problems_are_listed_together(path: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(path, ["train.steps=0", "cache.kind=most", "bogus_key=1"])
    text = str(caught.value)
    assert "3 problems" in text
    assert "train.steps" in text and "cache.kind" in text and "bogus_key" in text


def test_missing_keys_are_named_with_their_path(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {sources: [{name: a}]}\nstudent: {path: x}\n")
    with pytest.raises(InputError, match=r"data\.sources\.0\.path is missing"):
        load_config(str(file))


def test_a_missing_file_names_one_that_is_nearly_called_so(path: str) -> None:
    with pytest.raises(InputError, match=r"does not exist; did you mean .*run\.yaml\?"):
        load_config(path.replace("run.yaml", "runn.yaml"))


def test_a_yaml_error_tells_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  sources: [\ncache: {url: x}\n")
    with pytest.raises(InputError, match=r"not valid YAML: line 4, column 1: .*that began in line 2"):
        load_config(str(file))


def test_a_key_given_twice_is_an_error_not_a_surprise() -> None:
    with pytest.raises(InputError, match="line 2, column 1: key 'a' appears twice"):
        parse_yaml("a: 1\na: 2\n", "x.yaml")


@pytest.mark.parametrize(("text", "kind"), [("", "empty"), ("- 1\n", "a list"), ("word\n", "text")])
def test_a_config_must_be_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"this one is {kind}"):
        load_config(str(file))


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(str(file))


def test_a_folder_and_a_binary_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_config(str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00data")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(str(file))


def test_every_key_is_its_own_nearest_name() -> None:
    def paths(model: type, prefix: str) -> None:
        for name in model.model_fields:  # type: ignore[attr-defined]
            near, siblings = nearest_name([*prefix.split("."), f"{name}x"] if prefix else [f"{name}x"])
            assert near == (f"{prefix}.{name}" if prefix else name)
            assert name in siblings

    paths(RunConfig, "")
    for section in RunConfig.model_fields:
        annotation = RunConfig.model_fields[section].annotation
        paths(next(iter(get_args(annotation)), annotation), section)


def test_an_override_leaves_other_values_alone() -> None:
    values = {"a": {"b": 1, "c": [1, 2]}}
    apply_override(values, "a.c.1=5")
    assert values == {"a": {"b": 1, "c": [1, 5]}}
