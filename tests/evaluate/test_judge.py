"""The judge's second pass over a finished run: asked once per answer, kept, counted; a local endpoint stands in for it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evaluate import custom
from evaluate._run import main
from tests.evaluate.fakes import FakeEngine, fake_parts


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint: right if the word blue stands in the prompt's answer field, no verdict for "odd"."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            asked.append(prompt)
            text = "It depends." if "odd one" in prompt else f"Judgement: {int('deep blue' in prompt)}"
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_judge_pass(endpoint, tmp_path):
    url, asked = endpoint
    rows = [{"id": str(n), "problem": f"Colour {n}?", "answer": "blue", "problem_type": "open-ended"} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label = {"question": "Colour?", "gold": "blue", "answer": "deep blue", "label": 1}
    (tmp_path / "labels.jsonl").write_text(
        json.dumps(label) + "\n" + json.dumps({**label, "answer": "red", "label": 1})
    )
    words = {"0": "deep blue", "1": "red", "2": "an odd one", "3": ""}

    def answer(text):
        return next(f"<answer>{said}</answer>" for n, said in words.items() if f"Colour {n}?" in text)

    def run(*flags):
        make_engine, make_encoder, record = fake_parts(engine=FakeEngine(answer))
        arguments = ["--model", "m", "--data", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
        main(custom.BENCHMARK, [*arguments, "--judge_open", *flags], make_engine=make_engine, make_encoder=make_encoder)
        (path,) = list((tmp_path / "out").rglob("results.json"))
        return json.loads(path.read_text()), path.parent, record

    results, folder, _ = run()
    # An empty answer needs no judge: nothing was said.
    assert results["n_unjudged"] == 4 and results["metrics"]["accuracy"]["n"] == 0
    judging = ["--judge_url", url, "--judge_model", "stub", "--judge_labels", str(tmp_path / "labels.jsonl")]
    results, _, record = run(*judging)
    assert record.engine is None  # only the judging ran
    assert results["metrics"]["accuracy"] == {"value": 0.25, "low": results["metrics"]["accuracy"]["low"],
                                              "high": results["metrics"]["accuracy"]["high"], "n": 4}  # fmt: skip
    assert results["statuses"] == {"ok": 2, "judge_failed": 1, "no_answer": 1}
    judge = results["engine"]["judge"]
    assert (judge["asked"], judge["without_verdict"]) == (3, 1) and judge["identity"].startswith("stub/general/")
    assert judge["agreement"] == {"n": 2, "failed": 0, "share": 0.5, "kappa": 0.0}
    first = next(prompt for prompt in asked if "Colour 0?" in prompt)
    assert '"blue"' in first and '"deep blue"' in first
    lines = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert {line["id"]: line["verdict"] for line in lines} == {"0": 1, "1": 0, "2": None}
    # again: nothing is asked but the labelled set; and without a judge the verdicts stay
    before = len(asked)
    results, _, _ = run("--judge_url", url, "--judge_model", "stub")
    assert len(asked) == before and results["metrics"]["accuracy"]["value"] == 0.25
    results, _, _ = run()
    assert results["metrics"]["accuracy"]["value"] == 0.25 and results["n_unjudged"] == 0
