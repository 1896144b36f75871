"""The usage log's own vocabulary of features, from the specification of the host's schema."""

from trueup.errors import InvalidInputError

SECTIONS = frozenset(
    {
        "chat",
        "prompt_generation",
        "marketing_workflow",
        "knowledge_qa",
        "product_recommendation",
        "rag_pipeline",
        "web_knowledge",
        "session_memory",
        "intent_detection",
        "embedding_generation",
        "other",
    }
)


def check_section(section: object) -> str:
    """Return the section if the log has it. Raises `InvalidInputError` if not."""
    if not isinstance(section, str) or section not in SECTIONS:
        raise InvalidInputError(f"section: {section!r} is none of the log's sections: {', '.join(sorted(SECTIONS))}")
    return section
