"""The bodies of edits, templates, editors' holes and decisions: what they take, and how they refuse the rest."""

import copy
import json
import re

import pytest

from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schemas.decisions import Decision
from mlx_dgemma.server.schemas.editing import Completion, Edit, Fill, LlamaInfill, MistralFill
from mlx_dgemma.server.schemas.fields import parse_body

VALID = {
    Completion: {"prompt": "a", "keep_alive": "5m", "options": {"num_predict": 9, "stop": ["a"], "top_k": 4}},
    MistralFill: {"prompt": "a", "suffix": "b", "max_tokens": 9, "random_seed": 1, "stop": ["a"], "top_p": 0.5},
    LlamaInfill: {
        "input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "f", "text": "t"}], "prompt": "c",
        "n_predict": 9, "n_indent": 4, "samplers": ["top_k"], "response_fields": ["content"], "cache_prompt": True,
        "logit_bias": [], "lora": [], "n_probs": 0,
    },
    Edit: {"input": "a", "instruction": "b", "strength": 0.5, "n": 2, "max_tokens": 9},
    Fill: {"template": "{a}", "holes": {"a": 3, "b": ["x"], "c": "[0-9]"}, "prompt": "p"},
    Decision: {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "questions": [
            {"type": "predicate", "name": "n", "instructions": "a"},
            {"type": "choice", "instructions": "a", "choices": [{"value": "x", "description": "d"}, {"value": True}]},
            {"type": "score", "instructions": "a", "levels": [{"label": "x"}, {"label": "y"}]},
            {"type": "number", "instructions": "a", "min": -1, "max": 4, "step": 2},
        ],
        "answer": "{n}", "calibrate": True, "list_choices": False,
    },
}  # fmt: skip
ODD = (0, 1.5, "odd", [], [0], {}, {"type": "odd"})
SENTENCE = re.compile(r"[^;]+ (is .+; .+|is missing; give it|is not supported here; .+)\.")


def places(value, path=()):
    if path:
        yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(one, (*path, key))


@pytest.mark.parametrize("kind", VALID, ids=lambda kind: kind.__name__)
def test_whatever_is_wrong_is_told_by_a_sentence(kind):
    parse_body(kind, json.dumps(VALID[kind]).encode())
    refused = 0
    for path in places(VALID[kind]):
        for odd in ODD:
            body = copy.deepcopy(VALID[kind])
            place = body
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            try:
                parse_body(kind, json.dumps(body).encode())
            except ApiError as error:
                refused += 1
                assert (error.status, error.param.split(".")[0].split("[")[0]) == (400, path[0]), (path, odd)
                assert SENTENCE.fullmatch(str(error)), str(error)
    assert refused > 3 * len([*places(VALID[kind])])
