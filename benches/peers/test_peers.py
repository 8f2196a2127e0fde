"""Tests of everything that needs no engine: `python3 -m unittest discover benches/peers`."""

import contextlib
import dataclasses
import http.server
import io
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import ceiling
import child
import load
import machine
import models
import peer_quire
import run
import stats
import stepped
import table
import venvs
from cases import Case, Job, Setting, Skip
from models import Model
from table import Cell


def job(scratch: Path = Path("/nowhere"), **changes) -> Job:
    values = {
        "peer": "peer_quire",
        "python": sys.executable,
        "model": Model("m", Path("/models/m")),
        "precision": "bf16",
        "setting": Setting("default", {"a": 1}),
        "threads": 1,
        "cores": tuple(machine.cores(1)),
        "scratch": scratch,
        "max_tokens": 1000,
        "quire": "quire",
    }
    return Job(**values | changes)


def cell(engine: str, setting: str, number: int, value: float, unit: str = "tok/s") -> Cell:
    return Cell(("m", "decode-1", "int8"), engine, setting, number, value, unit=unit)


class Statistics(unittest.TestCase):
    def test_percentiles_are_numpys(self) -> None:
        self.assertEqual(stats.median([4, 1, 3, 2]), 2.5)
        self.assertAlmostEqual(stats.percentile([4, 1, 3, 2], 0.9), 3.7)
        self.assertEqual(stats.percentile([7], 0.99), 7)
        with self.assertRaises(ValueError):
            stats.median([])

    def test_spread_is_half_the_range(self) -> None:
        self.assertAlmostEqual(stats.spread([90, 100, 120]), 0.15)
        self.assertEqual(stats.spread([5]), 0)


class Table(unittest.TestCase):
    CELLS = [
        *(cell("Quire", "default", n, v) for n, v in enumerate([100, 120, 110], 1)),
        *(cell("B", "slow", n, v) for n, v in enumerate([10, 11, 200], 1)),
        *(cell("B", "fast", n, v) for n, v in enumerate([50, 55, 60], 1)),
        *(cell("C", "only", n, v) for n, v in enumerate([40, 41, 42], 1)),
    ]

    def test_the_best_setting_counts_by_its_median(self) -> None:
        found = table.figures(self.CELLS)
        self.assertEqual((found["B"].setting, found["B"].value), ("fast", 55))
        self.assertEqual(found["Quire"].value, 110)

    def test_one_fast_round_of_a_setting_left_out_does_not_count(self) -> None:
        found = table.figures([*self.CELLS, cell("B", "lucky", 1, 999)])
        self.assertEqual((found["B"].setting, found["B"].value), ("fast", 55))

    def test_ratio_is_of_medians_with_the_range_of_the_rounds(self) -> None:
        found = table.figures(self.CELLS)
        middle, low, high = table.ratio(found["Quire"], found["B"], lower=False)
        self.assertAlmostEqual(middle, 2.0)
        self.assertAlmostEqual(low, 110 / 60)
        self.assertAlmostEqual(high, 120 / 55)

    def test_of_seconds_fewer_are_better(self) -> None:
        cells = [cell("Quire", "q", 1, 2.0, "s"), cell("B", "x", 1, 4.0, "s"), cell("B", "y", 1, 3.0, "s")]
        found = table.figures(cells)
        self.assertEqual(found["B"].setting, "y")
        self.assertEqual(table.ratio(found["Quire"], found["B"], lower=True)[0], 1.5)
        self.assertIn("decode-1, s", table.render(cells))

    def test_rendered(self) -> None:
        lines = table.render(self.CELLS).splitlines()
        self.assertEqual(len(lines), 3)
        self.assertEqual(len({len(line) for line in lines}), 1)
        self.assertIn("| 110 ±9% ", lines[2])
        self.assertIn("| B (fast) ", lines[2])
        self.assertIn("| 2.00 (1.83-2.18) ", lines[2])

    def test_a_row_without_quire_or_without_peers_has_no_ratio(self) -> None:
        self.assertIn("| -     |", table.render([cell("B", "x", 1, 5.0)]).splitlines()[2])
        self.assertIn("| -         | -     |", table.render([cell("Quire", "x", 1, 5.0)]).splitlines()[2])

    def test_numbers_keep_three_digits(self) -> None:
        self.assertEqual([table.number(v) for v in (1234.5, 12.34, 1.234, 0.1234)], ["1,234", "12.3", "1.23", "0.123"])


class Ceiling(unittest.TestCase):
    LIMITS = ceiling.Limits(78, 1020, 2180)

    def rate(self, shape: str, case: str, precision: str, bits: int = 16) -> int:
        # As a rule the context is that of the middle of the decode steps that count: 524 tokens.
        model = Model(shape, models.SHAPES / shape)
        return round(ceiling.rate(model, dataclasses.replace(cases.BY_NAME[case], steps=24), precision, bits, self.LIMITS))

    def test_agrees_with_figures_worked_out_by_hand(self) -> None:
        for shape, case, rates in (
            ("qwen3-0.6b", "prefill-512", (1085, 2165, 2165)),
            ("qwen3-0.6b", "prefill-2048", (914, 1576, 1576)),
            ("qwen3-0.6b", "decode-1", (62, 119, 179)),
            ("qwen3-0.6b", "decode-8", (373, 579, 730)),
            ("qwen3-0.6b", "decode-32", (516, 759, 759)),
            ("llama-3.2-1b", "prefill-512", (515, 1080, 1080)),
            ("llama-3.2-1b", "decode-1", (31, 62, 100)),
            ("llama-3.2-1b", "decode-32", (378, 739, 739)),
        ):
            for precision, expected in zip(cases.PRECISIONS, rates, strict=True):
                self.assertAlmostEqual(self.rate(shape, case, precision), expected, delta=0.02 * expected + 1)
        self.assertAlmostEqual(self.rate("qwen3-0.6b", "decode-32", "int8", 8), 1073, delta=10)

    def test_either_the_ratio_or_the_share_meets_a_target(self) -> None:
        row = ("qwen3-0.6b", "decode-1", "int8")
        self.assertEqual(table._target(row, 1.7, 0.2), "1.61 or 84%: met")
        self.assertEqual(table._target(row, 1.1, 0.85), "1.61 or 84%: met")
        self.assertEqual(table._target(row, 1.1, 0.8), "1.61 or 84%: missed")
        self.assertEqual(table._target(("m", "decode-1", "int8"), 9.0, 1.0), "-")


class Rounds(unittest.TestCase):
    def close(self, engine: str, setting: str, share: float) -> bool:
        at = job(precision="int8", setting=Setting(setting))
        return table.is_close(Table.CELLS[:-3], engine, at, "decode-1", share)

    def test_settings_far_behind_are_left_out(self) -> None:
        self.assertTrue(self.close("Quire", "default", 0.9))
        self.assertTrue(self.close("B", "slow", 0.9))
        self.assertFalse(self.close("B", "fast", 0.9))
        self.assertTrue(self.close("B", "fast", 0.2))
        self.assertTrue(self.close("C", "never seen", 0.9))

    def test_a_run_goes_on_where_its_file_ends(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.json"
            args = run.arguments(["--json", str(path), "--append"])
            first = run.Results(args, {}, {})
            with contextlib.redirect_stderr(io.StringIO()):
                first.add(Table.CELLS)
            again = run.Results(args, {}, {})
            self.assertEqual(again.cells, Table.CELLS)
            self.assertEqual((again.next_round("m", "int8"), again.next_round("m", "bf16")), (4, 1))


class Arguments(unittest.TestCase):
    def test_defaults(self) -> None:
        args = run.arguments([])
        self.assertEqual(args.shapes, ["qwen3-0.6b", "llama-3.2-1b"])
        self.assertEqual((args.precisions, args.rounds, args.threads), (["bf16", "int8", "int4"], 3, 2))
        self.assertEqual(args.cases, ["prefill-512", "prefill-2048", "decode-1", "decode-8", "decode-32"])

    def test_lists(self) -> None:
        args = run.arguments(["--cases", "none", "--peers", "quire,vllm", "--server"])
        self.assertEqual((args.cases, args.peers, args.server), ([], ["quire", "vllm"], True))

    def test_nonsense_is_refused_by_name(self) -> None:
        for argv in (["--cases", "decode-2"], ["--rounds", "0"], ["--layers", "x"], ["--peers", "gpt"]):
            with self.subTest(argv), contextlib.redirect_stderr(io.StringIO()) as told:
                with self.assertRaises(SystemExit):
                    run.arguments(argv)
                self.assertIn(argv[1], told.getvalue())


class Models(unittest.TestCase):
    def test_shapes_have_their_parameters(self) -> None:
        for shape, millions in (("qwen3-0.6b", 596.0), ("llama-3.2-1b", 1235.8)):
            config = json.loads((models.SHAPES / shape / "config.json").read_text())
            count = sum(a * (b[0] if b else 1) for _, (a, *b) in models.tensors(config))
            self.assertAlmostEqual(count / 1e6, millions, delta=0.1)

    def test_weights_are_small_and_the_same_every_time(self) -> None:
        raw = models.random_bf16(random.Random(1), 20_000)
        self.assertEqual(raw, models.random_bf16(random.Random(1), 20_000))
        values = [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
        self.assertLess(abs(statistics.mean(values)), 0.001)
        self.assertAlmostEqual(statistics.stdev(values), 0.0164, delta=0.0005)
        self.assertLess(max(map(abs, values)), 2**-5)

    def test_a_vocabulary_has_no_word_twice(self) -> None:
        words = models.vocabulary(1000)
        self.assertEqual(len(set(words)), 1000)
        self.assertIn("th", words)

    def test_a_checkpoint_reads_back(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            config = {
                **{"model_type": "qwen3", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
                **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 300},
                **{"tie_word_embeddings": True, "bos_token_id": 298, "eos_token_id": [299]},
                "max_position_embeddings": 64,
            }
            path = Path(directory)
            models.write_weights(config, path)
            models.write_tokenizer(config, path)
            index = json.loads((path / "model.safetensors.index.json").read_text())
            (file,) = set(index["weight_map"].values())
            raw = (path / file).read_bytes()
            (length,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + length])
            entry = header["model.layers.1.mlp.down_proj.weight"]
            self.assertEqual((entry["shape"], entry["dtype"]), ([8, 16], "BF16"))
            self.assertEqual(index["metadata"]["total_size"], len(raw) - 8 - length)
            begin, end = header["model.norm.weight"]["data_offsets"]
            self.assertEqual(raw[8 + length + begin : 8 + length + end], b"\x80\x3f" * 8)
            tokenizer = json.loads((path / "tokenizer.json").read_text())
            self.assertEqual(len(tokenizer["model"]["vocab"]), 300)
            self.assertEqual([token["id"] for token in tokenizer["added_tokens"]], [298, 299])


class Jobs(unittest.TestCase):
    def test_json_and_back(self) -> None:
        there = job(quire_args=("--a", "b"))
        self.assertEqual(Job.from_json(json.loads(json.dumps(there.to_json()))), there)

    def test_the_cache_holds_every_case(self) -> None:
        case = cases.BY_NAME["decode-32"]
        self.assertEqual((case.batch, case.length, case.steps), (32, 512, 12))
        self.assertGreaterEqual(case.tokens, 32 * (512 + cases.WARMUP_STEPS + 12 + 1))


class Quire(unittest.TestCase):
    REPORT = {
        "rows": [
            {"name": "prefill_tok_s/m/512/bf16", "value": 670.0},
            {"name": "decode_tok_s/m/1/bf16", "value": 31.0},
            {"name": "decode_tok_s/m/32/bf16", "value": 182.0},
        ]
    }

    def test_rows_are_found(self) -> None:
        self.assertEqual(peer_quire.rate(self.REPORT, cases.BY_NAME["prefill-512"]), 670)
        self.assertEqual(peer_quire.rate(self.REPORT, cases.BY_NAME["decode-32"]), 182)
        with self.assertRaisesRegex(RuntimeError, "decode_tok_s row for 8"):
            peer_quire.rate(self.REPORT, cases.BY_NAME["decode-8"])

    def test_commands_say_what_the_case_is(self) -> None:
        words = " ".join(peer_quire.bench(job(precision="int4"), cases.BY_NAME["decode-32"]))
        for part in ("--batch-size 1,32 ", "--input-len 512 ", "--output-len 13 ", "--quantize int4", "--threads 1"):
            self.assertIn(part, words)
        words = " ".join(peer_quire.bench(job(), cases.BY_NAME["prefill-2048"]))
        self.assertIn("--input-len 2048 ", words)
        self.assertNotIn("--quantize", words)


class FakeEngine:
    """Gives out tokens as a batching engine does: prompts within the budget of a step, then one token each."""

    vocab_size = 1000

    def __init__(self) -> None:
        self.prompts: dict[int, int] = {}
        self.left: dict[int, int] = {}

    def add(self, request: int, prompt: list[int], output_len: int) -> None:
        self.prompts[request], self.left[request] = len(prompt), output_len

    def step(self) -> dict[int, int]:
        time.sleep(0.001)
        budget, given = cases.TOKEN_BUDGET, {}
        for request in list(self.left):
            part = min(budget, self.prompts[request])
            self.prompts[request] -= part
            budget -= part
            if not self.prompts[request]:
                given[request] = 1
                self.left[request] -= 1
                if not self.left[request]:
                    del self.left[request]
        return given


class Stepped(unittest.TestCase):
    def test_only_steps_in_which_all_decode_count(self) -> None:
        rate = stepped.run(FakeEngine(), Case("decode", 32, 512, 6))
        self.assertLess(rate, 32 / 0.001)
        self.assertGreater(rate, 32 / 0.02)

    def test_prefill_is_of_prompt_tokens(self) -> None:
        rate = stepped.run(FakeEngine(), Case("prefill", 1, 5000, 0))
        self.assertLess(rate, 5000 / 0.003)
        self.assertGreater(rate, 5000 / 0.06)

    def test_the_trace_keeps_to_its_clients(self) -> None:
        engine = FakeEngine()
        records = stepped.trace(engine, [(64, 3), (3000, 5), (64, 4)], clients=2)
        self.assertEqual([record.num_tokens for record in records], [3, 5, 4])
        self.assertGreaterEqual(records[2].sent, min(records[0].tokens[-1], records[1].tokens[-1]))
        self.assertFalse(engine.left)


class Trace(unittest.TestCase):
    def test_it_is_the_published_one(self) -> None:
        requests = load.trace()
        self.assertEqual(len(requests), 64)
        self.assertEqual(sum(prompt for prompt, _ in requests), 32_217)
        self.assertEqual(sum(output for _, output in requests), 11_175)
        self.assertTrue(all(64 <= prompt <= 1024 and 64 <= output <= 256 for prompt, output in requests))
        self.assertEqual(requests, load.trace())

    def test_impossible_totals_are_refused(self) -> None:
        with self.assertRaises(ValueError):
            load.lengths(2, 1, 5, 11, seed=1)

    def test_summary(self) -> None:
        records = [stepped.Record(0.0, [1.0, 1.5, 2.5], 3), stepped.Record(0.0, [3.0, 5.0], 2)]
        found = load.summary(records)
        self.assertEqual(found["server output"], (1.0, "tok/s"))
        self.assertEqual(found["server TTFT p50"], (2.0, "s"))
        self.assertEqual(found["server ITL p50"], (1.0, "s"))

    def test_streams_are_counted_over_http(self) -> None:
        with _server() as port:
            records = load.run(port, 1000, {"extra": 1}, [(8, 3)] * 40)
        self.assertEqual(len(records), 40)
        self.assertTrue(all(len(record.tokens) == 3 and record.num_tokens == 3 for record in records))

    def test_an_error_of_the_server_is_told(self) -> None:
        with _server(status=422) as port, self.assertRaisesRegex(RuntimeError, "status 422: no such field"):
            load.run(port, 1000, {}, [(8, 3)] * 4)


@contextlib.contextmanager
def _server(status: int = 200):
    """Streams as many tokens as asked for, in chunks, as servers do."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            if status != 200:
                self.send_header("Content-Length", "13")
                self.end_headers()
                self.wfile.write(b"no such field")
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events = [{"choices": [{"text": "w"}]} for _ in range(body["max_tokens"])]
            events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            for text in [*(json.dumps(event) for event in events), "[DONE]"]:
                data = f"data: {text}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_args) -> None:
            pass

    http.server.ThreadingHTTPServer.request_queue_size = load.CLIENTS
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Children(unittest.TestCase):
    PEER = """
        import os, time
        def prepare(job):
            return job.scratch
        class Engine:
            def __init__(self, job):
                print("noise on standard output", flush=True)
            def run(self, case):
                if case.length == 1:
                    raise RuntimeError("too short")
                if case.length == 2:
                    os._exit(3)
                if case.length == 3:
                    time.sleep(60)
                return len(os.sched_getaffinity(0)) / 2
    """

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = Path(directory.name)
        (self.path / "peer_fake.py").write_text(textwrap.dedent(self.PEER))

    def start(self) -> child.Child:
        fake = job(self.path, peer="peer_fake")
        return child.Child(fake, {"PYTHONPATH": str(self.path)}, self.path / "log")

    def case(self, length: int) -> dict:
        return dataclasses.asdict(Case("prefill", 1, length, 0))

    def test_answers_on_its_cores(self) -> None:
        with self.start() as worker:
            self.assertEqual(worker.ask(30, do="prepare")["path"], str(self.path))
            worker.ask(30, do="open")
            self.assertEqual(worker.ask(30, do="run", case=self.case(9))["value"], 0.5)
        self.assertEqual(worker.process.returncode, 0)
        self.assertIn("noise", (self.path / "log").read_text())

    def test_an_error_is_a_reason_and_not_the_end(self) -> None:
        with self.start() as worker:
            worker.ask(30, do="open")
            with self.assertRaisesRegex(Skip, "too short"):
                worker.ask(30, do="run", case=self.case(1))
            self.assertEqual(worker.ask(30, do="run", case=self.case(9))["value"], 0.5)

    def test_a_death_is_told(self) -> None:
        with self.start() as worker:
            worker.ask(30, do="open")
            with self.assertRaisesRegex(Skip, "status 3: noise on standard output"):
                worker.ask(30, do="run", case=self.case(2))

    def test_silence_ends_and_so_does_the_process(self) -> None:
        child.GRACE_S, grace = 0.1, child.GRACE_S
        self.addCleanup(setattr, child, "GRACE_S", grace)
        with self.start() as worker:
            worker.ask(30, do="open")
            with self.assertRaisesRegex(Skip, "no answer within 1 s"):
                worker.ask(1, do="run", case=self.case(3))
            with self.assertRaises(Skip):
                worker.ask(1, do="run", case=self.case(9))
        self.assertIsNotNone(worker.process.returncode)
        with self.assertRaises(ProcessLookupError):
            os.kill(worker.process.pid, 0)


class Environments(unittest.TestCase):
    def test_local_versions_become_public(self) -> None:
        self.assertEqual(venvs.public_version("torch==2.13.0+cpu"), "torch==2.13.0")
        self.assertEqual(venvs.public_version("torch<3,>=2"), "torch<3,>=2")

    def test_packages_have_names(self) -> None:
        lines = ["torch==2.13.0", "intel-openmp; platform_machine == 'x86_64'", "numpy"]
        self.assertEqual([venvs.package_name(line) for line in lines], ["torch", "intel-openmp", "numpy"])

    def test_other_load_is_seen(self) -> None:
        others = machine.Others()
        time.sleep(0.2)
        self.assertGreaterEqual(others.share(0.0), 0.0)


if __name__ == "__main__":
    unittest.main()
