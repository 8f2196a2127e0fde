"""The table's own logic, without a GPU: python3 -m unittest discover tests/gpu"""

import contextlib
import io
import json
import pathlib
import tempfile
import unittest

import report


class ReportTest(unittest.TestCase):
    def run_on(self, files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (pathlib.Path(folder) / name).write_text(text)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                status = report.main(folder)
            return status, out.getvalue(), json.loads((pathlib.Path(folder) / "results.json").read_text())

    def rows(self, **values):
        return {"rows": [{"name": name, "value": value, "unit": ""} for name, value in values.items()]}

    def test_rates_must_be_high_and_times_low(self):
        rows = {"copy_gb_s": 4000, "decode_gb_s/64x2048/bf16": 3200, "decode_us/1x1024/bf16": 10}
        status, table, result = self.run_on({"kernels.json": self.rows(**rows), "checks.json": {"checks": []}})
        self.assertEqual(status, 0, "a missed target fails nothing")
        met = {line["name"]: (line["value"], line["m1_met"], line["m2_met"]) for line in result["targets"]}
        self.assertEqual(met["decode attention B=64 ctx 2k, of copy"], (0.8, True, False))
        self.assertEqual(met["decode attention B=1 ctx 1k"], (10, True, False))
        self.assertEqual(len(met), 2, "what was not measured has no line")
        self.assertIn(f"{len(report.TARGETS) - 2} of {len(report.TARGETS)} targets were not measured", table)

    def test_what_adapters_take_must_be_little(self):
        rows = {"lora_of_products/64x8/r16": 0.1, "lora_us/64x8/r16": 50, "torch_lora_us/64x8/r16": 150}
        _, _, result = self.run_on({"kernels.json": self.rows(**rows)})
        met = [(line["value"], line["m1_met"], line["m2_met"]) for line in result["targets"]]
        self.assertEqual(met, [(0.1, True, False), (3.0, True, True)])

    def test_a_failed_check_fails_the_run(self):
        checks = {"checks": [{"name": "conformance", "result": "ok"}, {"name": "models", "result": "failed (101)"}]}
        status, table, _ = self.run_on({"checks.json": checks})
        self.assertEqual(status, 1)
        self.assertIn("2 checks, 1 failed: models", table)

    def test_both_modes_are_kept_apart_and_broken_files_are_said(self):
        name = "output_tok_s/llama-3.1-8b/128x128/bf16"
        _, table, result = self.run_on({
            "a.json": self.rows(**{name: 19.0}), "a.off.json": self.rows(**{name: 20.0}), "b.json": "{"})
        line = next(line for line in result["targets"] if line["name"].startswith("batch invariance"))
        self.assertAlmostEqual(line["value"], 0.05)
        self.assertIn("b.json left out", table)


if __name__ == "__main__":
    unittest.main()
