"""lm-evaluation-harness tasks over public documents (`kvtc eval --lm-eval NAME --data DIR`)."""
