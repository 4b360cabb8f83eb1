"""dspy: the language model itself, and a signature with its adapters, which ask for JSON by a schema."""

import dspy
from checks import KEY, MODEL, SORT, SORTED, URL, run, same

# Of lm_studio's models dspy believes without a list that they keep to a schema.
lm = dspy.LM(f"lm_studio/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, cache=False, num_retries=0, max_tokens=64)


def language_model():
    same(lm(SORT)[0], SORTED)


def decided():
    """The demo does not know dspy's prompts: the form of the answer is what can be asked of it."""
    return type(dspy.Predict("sentence -> adult: bool")(sentence="Anna is 31 years old.").adult)


def json_adapter():
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        same(decided(), bool)


def default_adapter():
    with dspy.context(lm=lm):
        same(decided(), bool)


run(language_model, json_adapter, default_adapter)
