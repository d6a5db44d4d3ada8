#!/usr/bin/env bash
# Responses to the run's prompts by vLLM, into responses.jsonl, with their log-probabilities.
cd "$(dirname "$0")" || exit
exec python3 generate.py "$@"
