"""Requests that would harm others: what fails, or takes long, stays its asker's own."""

import shutil
import threading

import pytest

import mlx_dgemma
from mlx_dgemma.checkpoint import DEMO
from mlx_dgemma.generate import Finished
from mlx_dgemma.schedule import Failed, Scheduler


@pytest.fixture
def schedule():
    """Makes schedulers of the demo, which are closed afterwards."""
    made = []

    def make(**options):
        made.append(Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def submit(scheduler, prompt, **arguments):
    """A function that waits for the last event of a request."""
    events, over = [], threading.Event()

    def listen(event):
        events.append(event)
        if isinstance(event, (Finished, Failed)):
            over.set()

    scheduler.submit(lambda: scheduler.engine.prepare(prompt, **arguments), listen)

    def last():
        assert over.wait(20)
        return events[-1]

    return last


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cache_folder_that_goes_away_ends_no_scheduler(schedule, tmp_path):
    folder = tmp_path / "cache"
    scheduler = schedule(cache_dir=folder)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match=r"^The prefix cache cannot be written \(.*Failed to open file"):
        submit(scheduler, "Spell the word cat. " * 20, seed=0, max_tokens=5)()
        assert submit(scheduler, "Spell the word cat.", seed=0)().result.text == "c a t"
