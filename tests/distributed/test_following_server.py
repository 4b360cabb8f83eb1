"""A server on two ranks, each with its part of the demo: the answers of one process, and what a lost rank comes to."""

import json
import os
import re
import signal
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from listeners import until
from support import RED, engine_of, strip
from test_following import ANNA, PERSON, SHORT
from watched_ranks import Ranks, alive

COMMAND = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "0", "--rows", "2"]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def ask(url, content, **fields):
    body = {"messages": [{"role": "user", "content": content}], **SHORT, **fields}
    request = Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def picture(image, tmp_path):
    image.save(tmp_path / "picture.png")
    url = f"data:image/png;base64,{b64encode((tmp_path / 'picture.png').read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_server_on_two_ranks_answers_as_one_process_and_ends_when_it_loses_one(demo, tmp_path):
    image, question = strip(RED), "What color is the shape?"
    seen = [picture(image, tmp_path), {"type": "text", "text": question}]
    environment = {"MLX_DGEMMA_MEASURE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with Ranks(tmp_path, [None] * 2, command=COMMAND, env=environment) as ranks:
        url = next(found[1] for line in ranks.processes[0].stderr if (found := re.search(r"(http://\S+/v1)", line)))
        alone = engine_of(demo)
        with ThreadPoolExecutor() as pool:
            answers = [
                pool.submit(ask, url, "Spell the word frog."),
                pool.submit(ask, url, ANNA, response_format=SCHEMA, max_tokens=30),
                pool.submit(ask, url, seen),
                pool.submit(ask, url, "Count from 3 to 30.", mode="speculative", temperature=0.7),
            ]
            wanted = [
                alone.generate("Spell the word frog.", **SHORT).text,
                alone.generate(ANNA, schema=PERSON, seed=3, max_tokens=30).text,
                alone.generate(question, images=[np.asarray(image)], **SHORT).text,
                alone.generate("Count from 3 to 30.", mode="speculative", temperature=0.7, **SHORT).text,
            ]
            assert [answer.result() for answer in answers] == wanted
            pids = [pid for rank in ranks.processes for pid in ranks.child_of(rank)]
            endless = {"max_denoising_steps": 1000, "patience": 0, "confidence_threshold": 0, "certainty_threshold": 0}
            hung = pool.submit(ask, url, "Count from 3 to 30.", max_tokens=4000, **endless)
            until(lambda: json.load(urlopen(f"{url[:-3]}/health"))["running"] == 1)
            os.kill(ranks.child_of(1)[0], signal.SIGKILL)
            code, said = ranks.ended()
            try:
                told = hung.result()
            except HTTPError as error:
                told = error.read().decode()
    assert code == 1
    assert re.search(r"Error: Rank 1 \(process \d+ on [^)]+\) was killed by SIGKILL\.\n$", said)
    assert "was killed by SIGKILL" in told
    assert not any(map(alive, pids))
