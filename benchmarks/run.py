# Copyright 2026 The tf_averaging Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Measures everything, and writes the results as Markdown and JSON: `make benchmark`.

Each workload runs in its own processes. In each, all contenders take their steps in turns, so that
anything else the machine does slows all of them alike.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Dict, List

from absl import app
from absl import flags
from absl import logging

from benchmarks import report

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Small variables and few rounds: to see that all of it runs.")
flags.DEFINE_float("seconds", 40.0, "How long to time the steps of each workload.")
flags.DEFINE_string("output_dir", "build/benchmark", "Where the results go.")
flags.DEFINE_list(
    "workloads",
    "resnet50,matrices,small,small300,xla_resnet50,xla_matrices,xla_small300,fit,long_run,scaling,embedding,"
    "rows,bfloat16,mirrored,transformer",
    "What to measure.",
)

# In how many processes a workload is measured, if not in one: those whose ratios differ most from one
# process to the next, with where variables lie in memory and with how fast the machine is meanwhile.
PROCESSES = {"resnet50": 5, "matrices": 5, "xla_resnet50": 5, "xla_matrices": 5}

ROOT = pathlib.Path(__file__).resolve().parent.parent


def measure(names: List[str]) -> Dict:
    """The figures of these workloads, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.measure", *names]
    command += ["--quick", "--seconds=1"] if FLAGS.quick else [f"--seconds={FLAGS.seconds}"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def import_seconds() -> List[float]:
    """The time of `import tf_averaging` after `import tf_keras`, in new processes."""
    code = (
        "import time, tensorflow, tf_keras; tf_keras.Model; start = time.perf_counter(); "
        "import tf_averaging; print(time.perf_counter() - start)"
    )
    return [
        float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))
        for _ in range(1 if FLAGS.quick else 5)
    ]


def main(_) -> None:
    output = pathlib.Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # A quick run has one process for all: most of a minute would go into starting them.
    groups = [FLAGS.workloads] if FLAGS.quick else [[name] for name in FLAGS.workloads]
    runs: Dict[str, List] = {"import_seconds": import_seconds()}
    for group in groups:
        for _ in range(1 if FLAGS.quick else PROCESSES.get(group[0], 1)):
            for name, figures in measure(group).items():
                runs.setdefault(name, []).append(figures)
            logging.info("%s: done after %.0f s", ", ".join(group), time.perf_counter() - start)
            (output / "results.json").write_text(json.dumps(runs, indent=1))
            (output / "results.md").write_text(report.markdown(runs))
    if "scaling" in runs:
        report.plot_scaling(report.median_of(runs["scaling"]), str(output / "scaling.png"))
    if "rows" in runs:
        report.plot_embedding(report.median_of(runs["rows"]), str(output / "embedding.png"))
    print(report.markdown(runs))


if __name__ == "__main__":
    app.run(main)
