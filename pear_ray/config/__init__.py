"""What a run can be told. Pydantic only: importing it loads no torch, ray or vllm."""
