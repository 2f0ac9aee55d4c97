"""What a life reports of each day: that which is known when the day's night is over, wherever it was slept."""

from __future__ import annotations

from pathlib import Path

from cortex_core.training.life import Day, Life
from pipelines.life_history import History
from tests.consolidation import sleepers
from tests.pipelines.living_scenes import away, local_nights, run_config


def test_a_day_is_asked_for_when_its_night_is_over(tmp_path: Path) -> None:
    """Two nights are away, and a day follows that has nothing to teach; one night comes back, a checkpoint is written,
    and a life that goes on from it waits for the other."""
    config = run_config(sleep_actor__synchronous=False, sleep_actor__queue_nights=3)
    reader = away(config, local_nights(config))
    life = Life(reader, config.life, sleepers.book().vocabulary, sleepers.book().filler)
    history = History(life)
    for number in range(3):
        if number == 2:
            reader.config = config.sleep.model_copy(update={"min_gain_nats": 1e9})
        history.add(Day(number, life.read_until((number + 1) * config.sleep.every_tokens + 1)), reader.num_handed_in)
        history.catch_up(reader.num_over)
    assert reader.num_away == reader.num_handed_in == 2 and reader.num_nights == 1
    assert history.days == history.known == [], "the third day's night is over, but not those before it"
    assert reader.settle(wait=True) and reader.num_over == 1
    history.catch_up(reader.num_over)
    assert [len(shares) for shares in history.known] == [1] and history.known[0][0] >= 0.5
    history.save(tmp_path)
    again = History(life)
    again.load(tmp_path)
    assert again.known == history.known and again.days == history.days
    assert reader.settle(wait=True)
    again.catch_up(reader.num_over)
    assert [len(shares) for shares in again.known] == [1, 2, 3] and again.known[1][1] >= 0.5
    assert again.days[1]["sleep/lessons"] > 0 == again.days[2]["sleep/lessons"]
