"""What is known to fail before anything is imported or started, from small files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cortex_core.errors import ConfigError, DataError, IncompatibleError
from pipelines.config import RunConfig, load_config
from pipelines.preflight import ASSETS, backbone_folder, check, check_against_backbone, check_against_machine

SHAPE = {"max_position_embeddings": 512, "num_attention_heads": 4, "hidden_size": 128, "num_hidden_layers": 4}


def backbone(
    folder: Path, shape: object = SHAPE, files: tuple[str, ...] = ("tokenizer.json", "model.safetensors")
) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    for file in files:
        (folder / file).touch()
    return str(folder)


def configured(**values: object) -> RunConfig:
    return load_config(None, {name.replace("__", "."): value for name, value in values.items()})


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    (line,) = str(error.value).splitlines()
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        {"text_config": SHAPE},
        {"n_positions": 512, "n_head": 4, "n_embd": 128, "n_layer": 4},
        {**SHAPE, "hidden_size": 999, "head_dim": 32},
    ],
    ids=["llama", "multimodal", "gpt2", "own head_dim"],
)
def test_a_model_sets_the_bounds(tmp_path: Path, shape: dict[str, object]) -> None:
    name = backbone(tmp_path / "model", shape)
    fits = {
        "backbone__name": name,
        "fast_weights__rank": 32,
        "backbone__segment_tokens": 512,
        "fast_weights__layers": [3],
    }
    check_against_backbone(configured(**fits))
    for key, value, parts in (
        ("fast_weights__rank", 33, ("fast_weights.rank = 33", "at most 32", "Set fast_weights.rank=32")),
        (
            "backbone__segment_tokens",
            576,
            ("backbone.segment_tokens = 576", "at most 512", "segment_tokens=512"),
        ),
        ("fast_weights__adapter_rank", 129, ("fast_weights.adapter_rank = 129", "at most 128")),
        ("fast_weights__layers", [0, 4], ("fast_weights.layers = [0, 4]", "at most 3", '"auto"')),
    ):
        with pytest.raises(ConfigError) as error:
            check_against_backbone(configured(**{**fits, key: value}))
        one_line(error, *parts, name)


def test_an_unknown_family_is_left_to_the_loader(tmp_path: Path) -> None:
    check_against_backbone(
        configured(backbone__name=backbone(tmp_path / "model", {"model_type": "new"}), fast_weights__rank=999)
    )


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_nothing_is_known_about_a_hub_id(name: str) -> None:
    assert backbone_folder(name) is None
    check_against_backbone(configured(backbone__name=name, fast_weights__rank=4096))


@pytest.mark.parametrize("name", ["./x", "../x", "~/x", "/x", "a/b/c"])
def test_a_path_is_a_path_whether_or_not_it_exists(name: str) -> None:
    with pytest.raises(DataError) as error:
        check_against_backbone(configured(backbone__name=name))
    one_line(error, f'backbone.name = "{name}"', "no such folder", "config.json", "save_pretrained", "hub id")


def test_a_folder_of_that_name_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(DataError) as error:
        check_against_backbone(configured(backbone__name="gpt2"))
    one_line(error, 'backbone.name = "gpt2"', "it has no config.json", "gpt2/config.json")


def test_a_builtin_that_does_not_ship() -> None:
    assert backbone_folder("builtin:x") == ASSETS / "x"
    with pytest.raises(DataError) as error:
        check_against_backbone(configured(backbone__name="builtin:no-such-model"))
    one_line(error, 'backbone.name = "builtin:no-such-model"', "no such folder", "ships: ")


@pytest.mark.parametrize(
    ("shape", "files", "kind", "parts"),
    [
        (SHAPE, ("model.safetensors",), IncompatibleError, ("no tokenizer", "tokenizer.json, tokenizer.model", "save_pretrained")),
        (SHAPE, ("vocab.json",), DataError, ("no weights", "*.safetensors", "save_pretrained")),
        ({"is_encoder_decoder": True}, (), IncompatibleError, ("is an encoder-decoder", "decoder-only")),
        ([], (), DataError, ("does not describe a model", "again")),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_usable_model(
    tmp_path: Path, shape: object, files: tuple[str, ...], kind: type[Exception], parts: tuple[str, ...]
) -> None:
    name = backbone(tmp_path / "model", shape, files)
    with pytest.raises(kind) as error:
        check_against_backbone(configured(backbone__name=name))
    one_line(error, f'backbone.name = "{name}"', *parts)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_damaged_description(tmp_path: Path, content: bytes) -> None:
    name = backbone(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        check_against_backbone(configured(backbone__name=name))
    one_line(error, "config.json", "is not JSON", "again")


def checked(folder: Path, **values: object) -> None:
    check(configured(**{"backbone__name": backbone(folder / "model"), "out_dir": str(folder / "runs"),
                        "cluster__num_workers": 0, **values}))  # fmt: skip


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        checked(tmp_path, data__path=str(tmp_path / "text"))
    one_line(error, f'data.path = "{tmp_path}/text"', "no such file or folder", ".jsonl", "leave it out")


def test_a_corpus_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.pdf").touch()
    for path, state in (
        (tmp_path / "text", "holds no file"),
        (tmp_path / "text" / "book.pdf", "is not a file"),
    ):
        with pytest.raises(DataError) as error:
            checked(tmp_path, data__path=str(path))
        one_line(error, f'data.path = "{path}"', state, ".txt, .jsonl, .parquet")
    (tmp_path / "text" / "a").mkdir()
    (tmp_path / "text" / "a" / "book.txt").touch()
    checked(tmp_path, data__path=str(tmp_path / "text"))


def test_what_lies_in_the_home_folder_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    backbone(tmp_path / "model")
    (tmp_path / "notes.txt").touch()
    checked(tmp_path, backbone__name="~/model", data__path="~/notes.txt")
    with pytest.raises(DataError) as error:
        checked(tmp_path, data__path="~/none.txt")
    one_line(error, 'data.path = "~/none.txt"', "no such file or folder")


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out_dir in ("file", "file/runs"):
        with pytest.raises(ConfigError) as error:
            checked(tmp_path, out_dir=str(tmp_path / out_dir))
        one_line(error, f'out_dir = "{tmp_path}/{out_dir}"', "is a file", "another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="may not be written to"):
        checked(tmp_path, out_dir=str(tmp_path / "closed" / "runs"))


def test_nothing_is_written(tmp_path: Path) -> None:
    checked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


CPUS = len(os.sched_getaffinity(0))


def test_more_workers_than_cpus() -> None:
    fits = {"training__batch_size": 2 * CPUS, "training__in_window_batch_size": 0}
    check_against_machine(configured(cluster__num_workers=CPUS, **fits))
    with pytest.raises(ConfigError) as error:
        check_against_machine(configured(cluster__num_workers=2 * CPUS, **fits))
    one_line(
        error, f"cluster.num_workers = {2 * CPUS} x cluster.cpus_per_worker = 1: must be at most {CPUS}, the CPUs",
        f"Set cluster.num_workers={CPUS} or cluster.cpus_per_worker=0.5, or cluster.address=auto",
    )  # fmt: skip
    check_against_machine(configured(cluster__num_workers=2 * CPUS, cluster__cpus_per_worker=0.5, **fits))
    check_against_machine(configured(cluster__num_workers=2 * CPUS, cluster__address="auto", **fits))
    check_against_machine(configured(cluster__num_workers=2 * CPUS, cluster__min_workers=CPUS, **fits))
    with pytest.raises(
        ConfigError, match=rf"cluster\.min_workers = {2 * CPUS} x .* Set cluster\.min_workers={CPUS} or "
    ):
        check_against_machine(configured(cluster__num_workers=2 * CPUS, cluster__min_workers=2 * CPUS, **fits))


def test_a_submitted_job_runs_on_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_against_machine(configured(cluster__num_workers=1, cluster__cpus_per_worker=CPUS + 1))


def test_a_worker_larger_than_the_machine() -> None:
    with pytest.raises(ConfigError) as error:
        check_against_machine(configured(cluster__num_workers=1, cluster__cpus_per_worker=CPUS + 1))
    one_line(
        error,
        f"cluster.cpus_per_worker = {CPUS + 1}",
        f"at most {CPUS}",
        f"Set cluster.cpus_per_worker={CPUS}, or",
    )


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(), reason="has a GPU")
def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError) as error:
        check_against_machine(configured(cluster__num_workers=1, cluster__use_gpu=True))
    one_line(error, "cluster.use_gpu = true", "at most 0", "Set cluster.use_gpu=false")
    check_against_machine(configured(cluster__num_workers=0, cluster__use_gpu=True))


def beside(**values: object) -> RunConfig:
    """With a life: a sleeper, and three who dream."""
    given = {"sidecars": "builtin:stdlib-1m/sidecars", "life__beside_training": True, "sleep__dream_frac": 0.5}
    given |= {"cluster__num_workers": 1, "cluster__cpus_per_worker": CPUS - 0.4, "dream_actors__num_generators": 3}
    return configured(**given | {"sleep_actor__num_cpus": 0.1, "dream_actors__num_cpus": 0.1} | values)


def test_actors_need_room_beside_the_workers() -> None:
    check_against_machine(beside())  # four times 0.1 are not quite 0.4
    check_against_machine(beside(dream_actors__num_generators=9, sleep__dream_frac=0.0))
    check_against_machine(beside(dream_actors__num_generators=9, life__beside_training=False))
    check_against_machine(beside(dream_actors__num_generators=9, cluster__num_workers=0))
    with pytest.raises(ConfigError) as error:
        check_against_machine(beside(dream_actors__num_generators=9))
    one_line(
        error, f"life.beside_training = true: the workers reserve {CPUS - 0.4:g} CPUs and the actors 1 (sleep_actor.num",
        f"+ 9 x dream_actors.num_cpus): must be at most {CPUS} together", "Lower cluster.cpus_per_worker, sleep_actor",
    )  # fmt: skip


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(), reason="has a GPU")
def test_actors_on_gpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError) as error:
        check_against_machine(beside(dream_actors__num_gpus=0.5))
    one_line(error, "the workers reserve 0 GPUs and the actors 1.5", "at most 0 together", "Lower sleep_actor.num_gpus")
