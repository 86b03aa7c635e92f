"""`transformers serve` answers for a converted model, as docs/from_flexolmo.md says.

Traps covered: a directory that `flexmore convert` wrote says by its auto_map whose it is; the
server looks the class up in the module `transformers`, of which it may hold an older copy.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from flexmore_kernels import cli
from tests.hf_models import filled
from tests.test_docs import DOCS, flexolmo

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")

ROOT = Path(__file__).parent.parent
SECONDS = 120  # of a slow machine; 5 are usual


def commands() -> dict[str, list[str]]:
    """The words of each command of the guide's section, by its program."""
    text = (DOCS / "from_flexolmo.md").read_text()
    (block,) = re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
    lines = block.replace("\\\n", "").splitlines()
    return {line.split()[1]: shlex.split(line)[2:] for line in lines if line[:2] == "$ "}


def answer(server: subprocess.Popen, request: urllib.request.Request, log: Path) -> dict:
    """What the server says as soon as it says anything."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=end - time.monotonic()) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from error
        except OSError:  # it does not listen yet
            ended = server.poll() is not None or time.monotonic() > end - 1
            assert not ended, log.read_text()[-3000:]
            time.sleep(0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_converted_model_is_served(tmp_path, monkeypatch):
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("needs transformers[serving]")
    pytest.importorskip("transformers.cli.transformers", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    flexolmo(transformers)
    source = transformers.FlexOlmoForCausalLM.from_pretrained("FlexOlmo-7x7B")
    filled(source).save_pretrained("FlexOlmo-7x7B")  # the first weights are too small to matter
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    Path("FlexOlmo-7x7B", "chat_template.jinja").write_text(template)
    assert cli.main(["convert", "FlexOlmo-7x7B", "FlexMoRE", "--rank", "16"]) == 0

    told = commands()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = told["curl"][0].replace("8000", str(port))
    payload = told["curl"][told["curl"].index("-d") + 1]
    request = urllib.request.Request(
        url, payload.encode(), headers={"Content-Type": "application/json"}
    )
    program = [sys.executable, "-m", "transformers.cli.transformers"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*program, *told["transformers"], "--device", "cpu", "--port", str(port)],
            env=os.environ | own, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        found = answer(server, request, log)
    finally:
        server.kill()
        server.wait()

    asked = json.loads(payload)
    tokenizer = transformers.AutoTokenizer.from_pretrained("FlexMoRE")
    ids = torch.tensor([tokenizer.encode(asked["messages"][0]["content"])])
    model = hf.FlexMoREForCausalLM.from_pretrained("FlexMoRE")
    tokens = model.generate(ids, max_new_tokens=asked["max_tokens"], do_sample=False)
    wanted = tokenizer.decode(tokens[0, ids.shape[1] :])
    assert found["choices"][0]["message"]["content"] == wanted
    assert found["usage"]["completion_tokens"] == asked["max_tokens"]
    assert len(set(wanted)) > 2  # a model that says one thing would hide much
