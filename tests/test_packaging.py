"""What is shipped, and what the code may import."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_services_and_nothing_that_shadows_others(tmp_path: Path):
    """An importable top-level `kernels` or `proto` would shadow packages of those names."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"albireo", "scheduler_svc", "worker_svc", "kvstore_svc", "albireo_kernels"}
    demo = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "NOTICE"}
    assert {f"albireo/demo/{name}" for name in demo} <= set(names)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_the_scheduler_and_the_command_line_import_no_torch():
    """They run where torch is not installed; import-linter proves it for every module, this for what really happens."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import albireo.cli.main, albireo.cli.serve, albireo.cli.generate, albireo.cli.bench\n"
        "import scheduler_svc.planner.main, scheduler_svc.frontend.main, scheduler_svc.__main__\n"
        "import kvstore_svc.main, kvstore_svc.redis_worker\n"
        "import worker_svc.__main__, worker_svc.stub.engine"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_import_contracts_hold():
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
