"""A fixture for a conftest to import: the spans that end during a test."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

_EXPORTER = InMemorySpanExporter()
_PROVIDERS: set[int] = set()


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Spans that ended during the test. The provider can be set once per process, so it is shared."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    if id(provider) not in _PROVIDERS:
        provider.add_span_processor(SimpleSpanProcessor(_EXPORTER))
        _PROVIDERS.add(id(provider))
    _EXPORTER.clear()
    return _EXPORTER
