"""Generated from ``protos/hexgen2/v1`` by ``make proto``; the import path is the proto package's."""
