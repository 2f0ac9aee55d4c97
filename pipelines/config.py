"""What one run is: the core's settings plus those of the edge, from a recipe and dotted overrides.

Layers, later wins: field default < recipe (TOML) < overrides `section.key=value`. The command line, a Tune
sample and an ablation all go through `load_config`. Nothing here imports torch or ray, so a wrong value is
answered at once.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cortex_core.config import (
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    FastWeightsConfig,
    OptimizerConfig,
    PositiveInt,
    Settings,
    TasksConfig,
    TrainingConfig,
)
from cortex_core.errors import ConfigError, DataError
from pipelines.explain import explain, nearest, parse_text

Overrides = Sequence[str] | Mapping[str, object]
S = TypeVar("S", bound=Settings)

RECIPES = Path(__file__).parent / "recipes"
CONFIG_FILE = "config.toml"
"""The resolved configuration, written into every run folder; `cortex evaluate` reads it."""
DATABASE_FILE = "mlflow.db"
"""MLflow's store, in `out_dir`."""
SIDECARS_FOLDER = "sidecars"
"""What a run trained, in its folder once it has finished."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("names the run's folder: use letters, digits, '.', '_' and '-', not '.' first")
    return name


class ClusterConfig(Settings):
    """Where the workers run."""

    address: str | None = None
    """None starts Ray on this machine for the length of the run; `auto` joins the cluster that is running."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Data-parallel workers, one process each; 0 runs in this process, without Ray."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1.0
    """CPUs that Ray reserves for each worker. A reservation, not a limit: threads are `worker_threads`."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    worker_threads: PositiveInt = 1
    """torch threads per worker. More than `cpus_per_worker` makes the workers fight over the cores."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Worker failures that are answered by resuming from the last checkpoint; -1 is no limit."""
    worker_start_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0
    """Seconds that the workers may take to be placed and to start."""
    storage_path: str | None = None
    """Folder or URI that every node sees, for Ray's checkpoints; None is `out_dir`, enough on one machine."""


class ShardingConfig(Settings):
    """How the frozen backbone is laid out over the workers. The sidecars are always replicated."""

    stage: Literal[0, 3] = 3
    """3 splits the backbone over the workers (ZeRO-3): less memory, one gather per layer. 0 copies it."""
    offload: Literal["none", "cpu"] = "none"
    """Where shards rest between uses; `cpu` saves GPU memory at the price of copies. Needs stage 3."""

    @model_validator(mode="after")
    def only_shards_are_offloaded(self) -> ShardingConfig:
        """A replicated backbone is used in place, there is nothing to offload."""
        if self.offload != "none" and self.stage != 3:
            raise ValueError(
                f'offload = "{self.offload}" needs shards, but stage = {self.stage} replicates the backbone: '
                'set stage to 3, or offload to "none"'
            )
        return self


class TrackingConfig(Settings):
    """Where MLflow writes."""

    uri: str | None = None
    """MLflow tracking URI; None is the database `mlflow.db` in `out_dir`."""
    experiment: Annotated[str, Field(min_length=1)] = "cortex"
    """MLflow experiment that the run is filed under."""
    system_metrics: bool = True
    """Also record CPU, memory, disk and network of the machine that drives the run."""


class RunConfig(Settings):
    """One run, completely: the same values give the same run."""

    name: Annotated[str, AfterValidator(_folder_name)] = "demo"
    """Name of the run and of its folder in `out_dir`. Starting it again under the same name resumes it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, of the tasks and of the order of the data."""
    out_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder for everything that runs write; relative to where the command is started."""
    backbone: BackboneConfig = BackboneConfig()
    """The frozen language model."""
    fast_weights: FastWeightsConfig = FastWeightsConfig()
    """The memory that is trained."""
    data: DataConfig = DataConfig()
    """Real text."""
    tasks: TasksConfig = TasksConfig()
    """What the memory is trained on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the sidecars are updated."""
    training: TrainingConfig = TrainingConfig()
    """Length, batch and objectives of the run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What the trained model is asked."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the workers run."""
    sharding: ShardingConfig = ShardingConfig()
    """How the backbone is laid out over them."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""

    @property
    def run_dir(self) -> Path:
        """Absolute folder of this run: configuration, checkpoints, report."""
        return Path(self.out_dir).absolute() / self.name

    @property
    def tracking_uri(self) -> str:
        """MLflow's store. Absolute, because Ray's workers run in another folder."""
        return self.tracking.uri or f"sqlite:///{Path(self.out_dir).absolute() / DATABASE_FILE}"

    @model_validator(mode="after")
    def batches_divide_evenly(self) -> RunConfig:
        """Every worker gets as many rows in every micro-batch, or gradients would be weighted wrongly."""
        workers, steps = max(self.cluster.num_workers, 1), self.training.accumulation_steps
        parts, factors = workers * steps, f"cluster.num_workers = {workers} x accumulation_steps = {steps}"
        for name in ("batch_size", "in_window_batch_size"):
            size = getattr(self.training, name)
            if size % parts:
                below, above = size - size % parts, size + parts - size % parts
                choice = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"training.{name} = {size} does not divide evenly over {factors}: must be a multiple of "
                    f"{parts}. Set training.{name} to {choice}, or change the number of workers"
                )
        return self


def load_config(recipe: str | Path | None = None, overrides: Overrides = ()) -> RunConfig:
    """`resolve` for a run."""
    return resolve(RunConfig, recipe, overrides)


def resolve(model: type[S], recipe: str | Path | None = None, overrides: Overrides = ()) -> S:
    """Resolve defaults, recipe and overrides to settings of the kind `model`.

    Args:
        model: the class of settings.
        recipe: path of a TOML file, the bare name of one that ships (`demo`), or None for the defaults.
        overrides: `["fast_weights.rank=8", ...]` as typed, or `{"fast_weights.rank": 8, ...}` as values.
            Typed values are TOML literals; text needs no quotes, lists no brackets, and `null` unsets.

    Raises:
        ConfigError: one line per wrong setting.
        DataError: the recipe cannot be read.
    """
    data = {} if recipe is None else _read_toml(find_recipe(recipe))
    for name, value in _pairs(model, overrides):
        _assign(data, name, value)
    try:
        # Strict, so that "8" and true are no integers; as JSON, where a list may still stand for a tuple.
        return model.model_validate_json(json.dumps(data, default=_plain), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(model, error.errors(include_url=False), data))) from None


def find_recipe(recipe: str | Path) -> Path:
    """The file that `recipe` means: a path, or the bare name of a recipe that ships."""
    path, shipped = Path(recipe), RECIPES / f"{recipe}.toml"
    if path.is_file():
        return path
    if path.name == str(recipe) and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in RECIPES.glob("*.toml"))
    what = "is a folder, not a recipe" if path.is_dir() else "no such recipe"
    hint = nearest(path.stem, names)
    raise DataError(
        f"{recipe}: {what}. Give the path of a TOML file or the name of one that ships: {', '.join(names)}"
        + (f". Did you mean {hint}?" if hint else "")
    )


def dump_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML, one key per line. `load_config` reads it back to an equal value."""
    top, sections = [], []
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            # None is left out: TOML has no null, and every field that may be None has it as default.
            lines = [f"{key} = {_toml(item)}" for key, item in value.items() if item is not None]
            sections.append("\n".join([f"[{name}]", *lines]))
        else:
            top.append(f"{name} = {_toml(value)}")
    return "\n\n".join(["\n".join(top), *sections]) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes what TOML wants escaped, except for one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        hint = "Text needs quotes, lists need brackets"
        raise ConfigError(f"{path}: not valid TOML: {error}. {hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 (byte {error.start}). A recipe is a TOML file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _pairs(model: type[Settings], overrides: Overrides) -> Iterable[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{text!r} is not an override: write name=value, such as training.steps=100")
        yield name.strip(), parse_text(model, name.strip(), value.strip())


def _assign(data: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name` in nested tables; a mapping is merged into its section, key by key."""
    *sections, key = name.split(".")
    table = data
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section; it has no keys")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _assign(data, f"{name}.{inner}", item)
    else:
        table[key] = value


def _plain(value: object) -> object:
    """JSON for what a recipe or a Tune sample may hold: numpy scalars as numbers, paths and dates as text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
