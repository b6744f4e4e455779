"""What the tests share: servers, processes, workloads, the oracle, faults."""
