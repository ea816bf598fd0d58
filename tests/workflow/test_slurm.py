"""The Slurm profile, with stand-ins for Slurm's commands that run each job here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdnb.run import Model
from tests.cli.processes import make

ROOT = Path(__file__).resolve().parents[2]
SLURM = {
    "sbatch": """#!{python}
import os, pathlib, subprocess, sys
number = len(list(pathlib.Path("{folder}").glob("*.words"))) + 1
job = "{folder}/" + str(number)
pathlib.Path(job + ".words").write_text(" ".join(sys.argv[1:]))
pathlib.Path(job + ".state").write_text("RUNNING")
(wrapped,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--wrap=")]
after = " && echo COMPLETED > " + job + ".state || echo FAILED > " + job + ".state"
subprocess.Popen(
    ["bash", "-c", "(" + wrapped + ") > " + job + ".out 2>&1" + after], start_new_session=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(SLURM_JOB_ID=str(number)),
)
print(number)
""",
    "srun": """#!{python}
import os, sys
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
os.execvp(sys.argv[first], sys.argv[first:])
""",
    "sacct": """#!/bin/bash
for state in {folder}/*.state; do echo "$(basename $state .state)|$(cat $state)"; done
""",
    "sacctmgr": "#!/bin/bash\necho research\n",
    **dict.fromkeys(("sinfo", "squeue", "scontrol"), "#!/bin/bash\n"),
}
PARAMETERS = 'model: str = "x"\nresults_dir: str = "r"\nbroken: bool = False'

pytest.importorskip("snakemake_executor_plugin_slurm", reason="an extra of its own: `make cluster-test`")


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text(text.replace("{python}", sys.executable).replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    return folder


def test_each_cell_is_a_job_with_its_gpu_and_a_failing_one_is_told(slurm, tmp_path):
    from tests.tiny import tiny_model  # not for a test that is skipped

    make(tmp_path / "templates" / "01_works.ipynb", ["assert not broken, 'no good'"], PARAMETERS)
    entries, folders = [], {}
    for name, broken in (("good", "false"), ("bad", "true")):
        model = tiny_model(tmp_path / "org" / name, layers=1)
        folders[name] = tmp_path / "results" / Model(str(model)).slug
        entries.append(f"  - {{model: {model}, parameters: {{broken: {broken}}}}}")
    (tmp_path / "models.yaml").write_text("\n".join(["models:", *entries]))
    workflow = ROOT / "workflow"
    program = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow / "Snakefile")]
    program += ["--profile", str(workflow / "profiles" / "slurm"), "--latency-wait", "5"]
    program += ["--config", "models=models.yaml", "templates=templates"]
    environment = os.environ | {"PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}"}
    told = {"capture_output": True, "text": True, "check": False, "timeout": 900}
    done = subprocess.run(program, cwd=tmp_path, env=environment, **told)
    assert done.returncode == 1 and "AssertionError: no good" in done.stdout + done.stderr
    jobs = [path.read_text() for path in slurm.glob("*.words")]
    assert len(jobs) == 2
    for words in jobs:
        for wanted in ("--gpus=1", "--cpus-per-task=4", "--mem 64000", "-t 240", "-p gpu", "-A research"):
            assert wanted in words
    assert (folders["good"] / "01_works.ipynb").is_file()
    assert (folders["bad"] / "01_works.failed.ipynb").is_file()
