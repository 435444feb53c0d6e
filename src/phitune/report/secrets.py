"""E-mail addresses and keys in a text, and how they may be shown: never whole.

A model that is trained on them may say them to anybody. Only forms that are hardly ever something
else are looked for; a name or a telephone number is not found.
"""

import re

# A search for these letters is fast, and a text without any of them needs no other.
_SIGNS = (
    *("@", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("sk-", "sk_", "xox", "AIza", "-----BEGIN", "hf_", "eyJ"),
)
_ASSIGNING = ("api", "secret", "token", "passw")

_EMAIL = re.compile(
    r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b"
)
# Domains that stand for nobody's address (RFC 2606).
_EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I
)
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # Amazon
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,}|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|\bsk_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # JSON web tokens
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
)
_ASSIGNED = re.compile(
    r"(?:api[_-]?key|secret(?:[_-]?key)?|(?:access|auth)[_-]?token|passw(?:or)?d)"
    r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z0-9/+_=.-]{16,})",
    re.IGNORECASE,
)
_SHOWN = 4


def secret_in(text: str) -> str | None:
    """The first address or key in a text, with all but its beginning hidden; None without one."""
    if any(sign in text for sign in _SIGNS):
        if key := _KEY.search(text):
            return f"key {hidden(key.group())}"
        for email in _EMAIL.finditer(text):
            name, _, domain = email.group().partition("@")
            if not _EXAMPLE_DOMAIN.search(domain):
                return f"e-mail {name[0]}...@{domain[0]}...{domain[domain.rindex('.') :]}"
    lowered = text.lower()
    if any(word in lowered for word in _ASSIGNING):
        for match in _ASSIGNED.finditer(text):
            value = match.group(1)
            # Words and variables have no digits; what does and is this long is no word.
            if any(c.isdigit() for c in value) and any(c.isalpha() for c in value):
                return f"key {hidden(value)}"
    return None


def hidden(secret: str) -> str:
    return f"{secret[:_SHOWN]}... ({len(secret)} characters)"
