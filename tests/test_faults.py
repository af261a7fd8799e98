"""Two rounds of tests/faults.py on real processes, and damage to every file that is read again."""

import json
import pathlib
import subprocess
import sys

import damage
import faults
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_no_damaged_file_is_read_as_another(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert damage.main(["--rounds=20"]) == 0


@pytest.mark.release
def test_no_fault_leaves_a_wrong_state_or_a_process_behind(tmp_path):
  command = [sys.executable, "tests/faults.py", "--rounds=2", f"--json={tmp_path / 'trials.jsonl'}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
  tried = [trial for trial in trials if trial["ok"] is not None]
  # A full disk is a small file system, which not every machine lets one mount.
  assert len(trials) == 2 * len(faults.FAULTS) and {trial["fault"] for trial in trials if trial["ok"] is None} <= {
    "disk full"
  }
  assert all(trial["ok"] for trial in tried)
  assert max(trial["seconds"] for trial in tried) < 60


@pytest.mark.release
def test_stalls_are_not_taken_for_hangs():
  command = [sys.executable, "tests/faults.py", "--stalls"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and "[0, 0]" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
