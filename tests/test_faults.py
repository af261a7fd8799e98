"""Three rounds of tests/faults.py: 48 faults on real processes."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_no_fault_leaves_a_wrong_state_or_a_process_behind(tmp_path):
  command = [sys.executable, "tests/faults.py", "--rounds=3", f"--json={tmp_path / 'trials.jsonl'}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
  tried = [trial for trial in trials if trial["ok"] is not None]
  assert len(tried) >= 40 and all(trial["ok"] for trial in tried)
  assert max(trial["seconds"] for trial in tried) < 60
