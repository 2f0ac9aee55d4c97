"""What a sweep will run: the study, the run that it varies, how many trials; or one line that says why not.

Nothing here imports torch or ray, so a wrong name or value is answered at once.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

from cortex_core.errors import ConfigError, DataError
from pipelines.config import RunConfig, load_config
from pipelines.explain import knobs, nearest, parse_text
from pipelines.resolve import find_recipe
from pipelines.trained import require_new_memory
from tune_spaces.study import SHIPPED, SHORT, Choice, Search, Study, domain

TRIALS_FOLDER = "trials"
"""In the sweep's folder: a run per trial."""
_NOT_SWEPT = {"name", "out_dir", "cluster", "tracking", "validation", "evaluation"}
_MOVED_IN_TRAINING = {
    "read_strength",
    "write_noise",
    "kl_weight",
    "sparsity_weight",
    "sparsity_margin",
    "filler_windows",
}
_MOVED = {"optimizer"} | {f"training.{name}" for name in _MOVED_IN_TRAINING | {"ema_decay"}}
"""What a checkpoint can go on with when it changes: neither a shape, nor the data, nor what has happened by now."""
_KEYS = {"about", "recipe", "overrides", "space", "search", "num_trials", "grid_points"}


class SweepPlan(NamedTuple):
    """One sweep."""

    study: Study
    config: RunConfig
    """The run that is varied. Results go to its folder, every trial's run to a folder in there."""
    recipe: RunConfig
    """The same without what the study shortens: what the best trial's values are written into."""
    stop_early: bool
    """Whether trials that do worse than others after as many steps are stopped (ASHA, Li et al. 2020)."""
    concurrent: int | None
    """Trials at a time; None is as many as there are CPUs or GPUs for."""

    def best(self, sample: Mapping[str, object]) -> RunConfig:
        """The recipe with a trial's values."""
        return load_config(None, self.recipe.model_dump() | dict(sample) | {"name": f"{self.config.name}-best"})

    def identity(self) -> dict[str, Any]:
        """What may not change between the parts of one sweep, as JSON has it."""
        kept = self.config.model_dump(mode="json", exclude={"cluster", "tracking", "out_dir"})
        space = {name: [type(of).__name__, vars(of)] for name, of in self.study.space.items()}
        study = {"space": space, "search": self.study.search, "trials": self.study.num_trials}
        return json.loads(json.dumps(study | {"stop_early": self.stop_early, "config": kept}))


def trial_config(sweep: RunConfig, name: str, sample: Mapping[str, object]) -> RunConfig:
    """A trial's run: an ordinary one, in a folder of its own below the sweep's, tracked where the sweep is."""
    place = {"name": name, "out_dir": str(sweep.run_dir / TRIALS_FOLDER)}
    place |= {"tracking.uri": sweep.tracking_uri, "tracking.system_metrics": False}
    return load_config(None, sweep.model_dump() | dict(sample) | place)


def plan(
    study: str,
    overrides: Sequence[str] = (),
    *,
    trials: int | None = None,
    search: Search | None = None,
    stop_early: bool = True,
    concurrent: int | None = None,
) -> SweepPlan:
    """Resolve a sweep.

    Args:
        study: name of one that ships, or path of a TOML file.
        overrides: `name=value` as typed, for all trials; one that the study varies is not varied any more.
        trials: how many; None is the study's number. A grid has a trial per point.
        search: how values are drawn; None is the study's way.
        stop_early: whether poor trials are stopped. Never with `pbt`, where they go on from good ones.
        concurrent: trials at a time, at most.

    Raises:
        ConfigError: one line per problem: a setting that does not exist or cannot be varied, a bound that the run
            refuses, nothing left to vary.
        DataError: the study or its recipe cannot be read.
    """
    chosen = _find(study)
    fixed = {text.partition("=")[0].strip() for text in overrides}
    space = {name: of for name, of in chosen.space.items() if name not in fixed}
    if not space:
        raise ConfigError(f"study {study}: every setting that it varies is set to one value; leave one of them out")
    chosen = replace(chosen, space=space, search=search or chosen.search)
    points = math.prod(len(of.grid(chosen.grid_points)) for of in space.values())
    if chosen.search == "grid" and trials not in (None, points):
        raise ConfigError(f"--trials {trials}: a grid of this study has {points}, a trial per point. Leave it out")
    chosen = replace(chosen, num_trials=points if chosen.search == "grid" else trials or chosen.num_trials)
    recipe = find_recipe(chosen.recipe)
    typed = {name: parse_text(RunConfig, name, text) for name, text in _split(overrides)}
    named = {"name": chosen.name} | typed
    stop_early = stop_early and chosen.search != "pbt"
    made = SweepPlan(
        chosen, load_config(recipe, dict(chosen.overrides) | named), load_config(recipe, named), stop_early, concurrent
    )
    require_new_memory(made.config, "cortex tune")
    _check(made)
    return made


def _split(overrides: Sequence[str]) -> list[tuple[str, str]]:
    load_config(None, [text for text in overrides if "=" not in text])  # says how one is written
    return [(name.strip(), text.strip()) for name, _, text in (each.partition("=") for each in overrides)]


def _find(study: str) -> Study:
    if study in SHIPPED:
        return import_module(f"tune_spaces.{study}").STUDY
    path = Path(study)
    if path.is_file():
        return read(path)
    hint = nearest(path.stem, SHIPPED)
    raise DataError(
        f"{study}: no such study. Give the name of one that ships, {', '.join(SHIPPED)}, or the path of a TOML file"
        + (f". Did you mean {hint}?" if hint else "")
    )


def read(path: Path) -> Study:
    """A study from a TOML file: `[space]` with a range per setting, and what else a `Study` has.

    Raises ConfigError or DataError, one line that names the file.
    """
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}. Text needs quotes, lists need brackets") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}). A study is a TOML file") from None
    unknown = sorted(given.keys() - _KEYS)
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: no such key. A study has {', '.join(sorted(_KEYS))}")
    if not isinstance(given.get("space"), dict) or not given["space"]:
        raise ConfigError(f'{path}: has no [space]. Name a setting and its range, e.g. "fast_weights.rank" = [8, 16]')
    try:
        space = {name: domain(name, described) for name, described in _flat(given["space"]).items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    kinds = {"about": str, "recipe": str, "num_trials": int, "grid_points": int, "overrides": dict, "search": str}
    for name, kind in kinds.items():
        if name in given and not (isinstance(given[name], kind) and given[name]):
            raise ConfigError(f"{path}: {name} = {given[name]!r}: must be {kind.__name__}, not empty or 0")
    ways = get_args(Search)
    if given.get("search", "tpe") not in ways:
        raise ConfigError(f"{path}: search = {given['search']!r}: must be {', '.join(ways[:-1])} or {ways[-1]}")
    return Study(
        path.stem, given.get("about", path.stem), space, given.get("recipe", "demo"),
        dict(SHORT) | _flat(given.get("overrides", {})),
        **{name: given[name] for name in ("num_trials", "search", "grid_points") if name in given},
    )  # fmt: skip


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names, whether they were written with quotes or as tables. A range is no table."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check(of: SweepPlan) -> None:
    """Every bound of every range gives a run that may be started, and trials say something before they end."""
    known = {knob.name for knob in knobs(RunConfig)}
    lines: list[str] = []
    for name, values in of.study.space.items():
        if name not in known or name.partition(".")[0] in _NOT_SWEPT:
            hint = nearest(name, known)
            why = "cannot be varied: it does not decide what is learned" if name in known else "no such setting"
            lines.append(
                f"study {of.study.name}: {name}: {why}"
                + (f". Did you mean {hint}?" if name not in known and hint else "")
            )
            continue
        for value in values.values if isinstance(values, Choice) else (values.low, values.high):
            try:
                trial_config(of.config, "check", {name: value})
            except ConfigError as error:
                lines += [f"study {of.study.name}, {name} = {value}: {line}" for line in str(error).splitlines()]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    every, steps = of.config.validation.every_steps, of.config.training.steps
    if not 0 < every <= steps:
        raise ConfigError(
            f"validation.every_steps = {every}: must be 1 to {steps} (training.steps) in a sweep, which compares "
            f"trials by their validation. Set validation.every_steps={max(1, steps // 6)}"
        )
    if of.config.cluster.num_workers == 0:
        raise ConfigError("cluster.num_workers = 0: a sweep runs trials side by side on Ray. Set cluster.num_workers=1")
    if of.study.search == "pbt":
        _check_population(of)


def _check_population(of: SweepPlan) -> None:
    """Trials can take over one another's weights, and have something to learn with them."""
    kept = [name for name in of.study.space if not {name, name.partition(".")[0]} & _MOVED]
    if kept:
        raise ConfigError(
            f"study {of.study.name}: {', '.join(kept)}: pbt changes settings while a run goes on, and weights do not "
            f"outlive a change of {'this one' if len(kept) == 1 else 'these'}. Give a value for all trials, e.g. "
            f"{kept[0]}={of.study.space[kept[0]].grid(2)[0]}, or choose another --search"
        )
    every, steps = of.config.validation.every_steps, of.config.training.steps
    if every == steps:
        raise ConfigError(
            f"validation.every_steps = {every}: must be below {steps} (training.steps) with pbt, which changes "
            f"settings at validations. Set validation.every_steps={max(1, steps // 6)}"
        )
    if of.study.num_trials < 2:
        raise ConfigError(
            f"--trials {of.study.num_trials}: must be 2 or more with pbt: one takes over another's weights"
        )
    if of.config.cluster.storage_path is not None:
        raise ConfigError(
            f"cluster.storage_path = {of.config.cluster.storage_path}: with pbt checkpoints are handed on in out_dir. "
            "Leave it out, and set out_dir to a folder that all nodes share"
        )
