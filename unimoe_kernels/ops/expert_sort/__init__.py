"""The operator `expert_sort`."""
