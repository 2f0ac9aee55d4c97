"""Every knob of the core: one class per component, one default per knob, bounds checked when it is built.

No torch, no ray: `cortex --help` and a wrong value are answered before either is imported. The line under a field is
its documentation: unit, range, effect. Cross-field rules are validators named after the rule.
"""

from __future__ import annotations

from cortex_core.config.backbone import ASSETS, BUILTIN, BackboneConfig
from cortex_core.config.consolidation import (
    CodesConfig,
    FisherConfig,
    ReplayConfig,
    ScalingConfig,
    SegmentsConfig,
    SleepConfig,
)
from cortex_core.config.data import (
    CORPUS_SUFFIXES,
    DataConfig,
    EvaluationConfig,
    FillerName,
    SourceName,
    TaskName,
    TasksConfig,
    ValidationConfig,
)
from cortex_core.config.dreaming import DreamConfig, JudgeConfig, MemoryGraphConfig, ScenarioConfig
from cortex_core.config.fast_weights import FastWeightsConfig
from cortex_core.config.life import LifeConfig
from cortex_core.config.night import NightConfig
from cortex_core.config.settings import Fraction, NonNegative, PositiveInt, Settings
from cortex_core.config.training import OptimizerConfig, TrainingConfig, UpdateConfig
from cortex_core.config.unfreeze import UnfreezeConfig

__all__ = [
    "ASSETS",
    "BUILTIN",
    "CORPUS_SUFFIXES",
    "BackboneConfig",
    "CodesConfig",
    "DataConfig",
    "DreamConfig",
    "EvaluationConfig",
    "FastWeightsConfig",
    "FillerName",
    "FisherConfig",
    "Fraction",
    "JudgeConfig",
    "LifeConfig",
    "MemoryGraphConfig",
    "NightConfig",
    "NonNegative",
    "OptimizerConfig",
    "PositiveInt",
    "ReplayConfig",
    "ScalingConfig",
    "ScenarioConfig",
    "SegmentsConfig",
    "Settings",
    "SleepConfig",
    "SourceName",
    "TaskName",
    "TasksConfig",
    "TrainingConfig",
    "UnfreezeConfig",
    "UpdateConfig",
    "ValidationConfig",
]
