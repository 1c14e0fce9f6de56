# Placeholder until the build is in place.
VENV := .venv
.PHONY: proto
proto:
	$(VENV)/bin/python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc protos/hexgen2/v1/*.proto
