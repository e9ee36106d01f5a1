"""Builds examples/mpi_comm.c with $MPICC (mpicc) and runs it with $MPIRUN (mpirun) on 1, 2, 4 and 5 ranks. Exits with
77 (skipped) without MPI."""

import os
import shlex
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MPICC = shlex.split(os.environ.get("MPICC") or "mpicc")
MPIRUN = shlex.split(os.environ.get("MPIRUN") or "mpirun")


def attempt(command):
    """Exit status and output; 127 when there is no such program."""
    try:
        p = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=120, text=True
        )
        return p.returncode, p.stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return 127, str(e)


def skip(why):
    print(f"skip interop_mpi: {why}")
    sys.exit(77)


def run_options(program):
    """Options with which this machine starts more ranks than cores: Open MPI needs them, others do not know them."""
    for options in (["--oversubscribe", "--allow-run-as-root"], ["--oversubscribe"], []):
        if attempt(MPIRUN + options + ["-n", "2", program])[0] == 0:
            return options
    return None


def main():
    with tempfile.TemporaryDirectory() as directory:
        empty, empty_source = os.path.join(directory, "empty"), os.path.join(directory, "empty.c")
        with open(empty_source, "w") as f:
            f.write("#include <mpi.h>\nint main(int c, char **v) { MPI_Init(&c, &v); MPI_Finalize(); return 0; }\n")
        if attempt(MPICC + ["-o", empty, empty_source])[0] != 0:
            skip(f"{MPICC[0]} does not compile here")
        options = run_options(empty)
        if options is None:
            skip(f"{MPIRUN[0]} does not run here")
        # the last time messages are cut into parts of 1000 bytes
        for flags, words in (([], []), ([], ["--no-direct"]), (["-DMPI_PART=1000"], ["--no-direct"])):
            program = os.path.join(directory, "mpi_comm")
            status, text = attempt(
                MPICC
                + ["-std=gnu99", "-O1", "-Wall", "-Wextra", "-Werror", "-I", ROOT]
                + flags
                + ["-o", program, os.path.join(ROOT, "examples", "mpi_comm.c"), "-lm", "-lpthread", "-lrt"]
            )
            if status != 0:
                sys.exit(f"FAIL interop_mpi: does not compile:\n{text}")
            for ranks in (1, 2, 4, 5):
                status, text = attempt(MPIRUN + options + ["-n", str(ranks), program] + words)
                expected = f"mpi_comm: {ranks} ranks, 8 tensors, 98304 bytes, 3 versions, every byte right"
                if status != 0 or expected not in text.splitlines():
                    what = f"{ranks} ranks {flags + words}: status {status}, expected {expected!r}"
                    sys.exit(f"FAIL interop_mpi: {what}:\n{text}")
                print(f"ok {ranks} ranks {' '.join(flags + words)}")


main()
