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
"""ParameterServerStrategy: a coordinator, two workers, one server or two with variables in two shards."""

import parameter_server_program as program
import processes
import pytest

SECONDS = 400
SERVERS = (1, 2)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def coordinators(tmp_path_factory):
    """Of both clusters, at once: each restores what the other saves."""
    directory = tmp_path_factory.mktemp("parameter_server")
    with processes.Children(directory) as children:
        coordinators = {}
        for servers in SERVERS:
            cluster = children.cluster_variables(chief=1, worker=2, ps=servers)
            others = {
                task: children.start(f"{servers}-{task}", "server_program.py", variables=variables)
                for task, variables in cluster.items()
                if task != "chief0"
            }
            pids = [others[worker].pid for worker in ("worker0", "worker1")]
            other = SERVERS[1 - SERVERS.index(servers)]
            coordinators[servers] = children.start(
                f"coordinator-{servers}",
                "parameter_server_program.py",
                servers,  # As many shards as servers.
                f"save={directory}/{servers}",
                "all_checks",
                f"save={directory}/{servers}-swapped",
                f"restore={directory}/{other}",
                f"restore={directory}/{other}-swapped",
                f"worker_dies={pids[0]},{pids[1]},{directory}/{servers}-ps",
                variables=cluster["chief0"],
            )
        yield children, coordinators


@pytest.mark.parametrize(
    ("servers", "check"),
    [(servers, check.__name__) for servers in SERVERS for check in program.CHECKS],
)
def test_with_parameter_servers(coordinators, servers, check):
    children, by_servers = coordinators
    coordinator = by_servers[servers]
    children.wait_for_end([coordinator], SECONDS)
    passed = f"[passed] {check}\n" in coordinator.output
    assert passed, coordinator.part(f"[running] {check}\n", "[running]")


@pytest.mark.parametrize("servers", SERVERS)
def test_restored_under_another_sharding(coordinators, servers):
    """With averaged BatchNormalization; a checkpoint that was written while swapped, too."""
    children, by_servers = coordinators
    children.wait_for_end([by_servers[servers]], SECONDS)
    for command in ("save", "restore"):
        assert by_servers[servers].output.count(f"[passed] {command}\n") == 2, children.story()


@pytest.mark.parametrize("servers", SERVERS)
def test_worker_that_dies_in_an_update_holds_up_nobody(coordinators, servers):
    children, by_servers = coordinators
    children.wait_for_end([by_servers[servers]], SECONDS)
    part = by_servers[servers].part("[running] worker_dies\n", "[running]")
    assert "[passed] worker_dies\n" in part, part
