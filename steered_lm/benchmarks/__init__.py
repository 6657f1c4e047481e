"""TruthfulQA and MMLU as rows: from a local folder or the hub, the same items for both harnesses. Light at import."""
