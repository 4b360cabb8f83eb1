"""Requests take turns: the order of work, counted in chunks of prompts and steps of canvases."""

import numpy as np
import pytest
from loop import OPTIONS, Reader, request_of
from support import small_model

from mlx_dgemma.decoding import loop as loop_module
from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.session import Session

CHUNK = 4


class Watched:
    """A loop to which requests come at given steps. `work` has for each step its chunks and the rows denoised."""

    def __init__(self, monkeypatch, lengths, arrivals, blocks=2):
        model, self.work = small_model(3, scale=0.2, max_position_embeddings=512), []
        rng, encode, advance = np.random.default_rng(0), Session.encode, loop_module.advance
        sessions, groups = {}, []

        def encode_watched(session, *arguments):
            for chunk in encode(session, *arguments):
                self.work[-1][0].append(sessions[id(session)])
                yield chunk

        def advance_watched(batch, ahead=True):
            groups.append(len(batch.prefixes))
            return advance(batch, ahead)

        monkeypatch.setattr(Session, "encode", encode_watched)
        monkeypatch.setattr(loop_module, "advance", advance_watched)
        loop, numbers = Loop(model), {}
        left = sorted(range(len(lengths)), key=lambda i: (arrivals[i], i))
        while left or loop.requests:
            while left and arrivals[left[0]] <= len(self.work):
                i = left.pop(0)
                prompt = rng.integers(0, 39, lengths[i]).tolist()
                request, session = request_of(model, prompt, Reader(blocks), i, OPTIONS, chunk=CHUNK)
                numbers[request], sessions[id(session)] = i, i
                loop.add(request, session)
            self.work.append(([], []))
            groups.clear()
            for request, event in loop.step():
                assert not isinstance(event, Exception), event
                if isinstance(event, Draft):
                    self.work[-1][1].append(numbers[request])
            assert len(groups) <= 1  # all are alike, so they are denoised together

    def chunks_of(self, i):
        """The steps in which a chunk of its prompt was encoded."""
        return [step for step, (chunks, _) in enumerate(self.work) if i in chunks]

    def steps_of(self, i):
        """The steps in which its canvas was denoised."""
        return [step for step, (_, rows) in enumerate(self.work) if i in rows]


@pytest.mark.parametrize("seed", range(4))
def test_prompts_are_encoded_in_turns_between_the_steps_of_others(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 3, 4, 9, 40, 90], 5).tolist()
    arrivals = rng.integers(0, 12, 5).tolist()
    watched = Watched(monkeypatch, lengths, arrivals)
    for i, length in enumerate(lengths):
        chunks, steps = watched.chunks_of(i), watched.steps_of(i)
        assert len(chunks) == -(-length // CHUNK)
        # While it waits for its next chunk each of the others gets one at most.
        for before, after in zip([arrivals[i] - 1, *chunks], chunks):
            others = [one for step in range(before + 1, after) for one in watched.work[step][0]]
            assert len(others) == len(set(others)) == after - before - 1
        # Its canvas joins the others at the next border, and then it is denoised in every step.
        assert steps[0] - chunks[-1] <= 1
        assert steps == list(range(steps[0], steps[-1] + 1))
    assert all(len(chunks) <= 1 for chunks, _ in watched.work)


def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch):
    watched = Watched(monkeypatch, [200, 4, 6], [0, 10, 11], blocks=1)
    assert watched.chunks_of(1) == [11]
    assert watched.chunks_of(2) == [13, 15]
    assert watched.steps_of(2)[-1] < watched.chunks_of(0)[-1]
