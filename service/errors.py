"""Every error a caller may meet: its status, its code and its message.

An error here is a sentence to a caller, with its data as attributes; `problem` turns it into RFC 9457
`application/problem+json` with a plain `error` string beside the standard members. What is not listed here never
reaches a caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec


class PlimsollError(Exception):
    """Base of all errors of the service that a person or a program can act on."""


class ConfigurationError(PlimsollError):
    """The process cannot start as it was set up; the message names the setting and the mend."""


class BadUsage(PlimsollError):
    """What a person gave a command is not acceptable; the message names the flag. Exit code 64."""


class ApiError(PlimsollError):
    """An answer other than success. Subclasses fix status, code and title; the message is the detail."""

    status: ClassVar[int]
    code: ClassVar[str]  # last part of the problem's `type`; stable
    title: ClassVar[str]  # the same for every occurrence (RFC 9457, section 3.1.3)
    type_uri: ClassVar[str | None] = None  # null: one of our own, made from the code

    def __init__(self, detail: str, **extensions: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extensions = extensions

    def headers(self) -> dict[str, str]:
        """Return the header fields that belong to this answer."""
        return {}


class Malformed(ApiError):
    """The bytes are not what they claim to be: no JSON, no object."""

    status, code, title = 400, "malformed", "Malformed request"


class Unauthenticated(ApiError):
    """No token, an unknown one, a revoked one or an expired one: the caller is not told which."""

    status, code, title = 401, "unauthenticated", "Authentication required"

    def headers(self) -> dict[str, str]:
        """Name the scheme, as RFC 9110, section 11.6.1 asks."""
        return {"www-authenticate": 'Bearer realm="plimsoll"'}


class RoleTooLow(ApiError):
    """The token is good, but its role may not do this."""

    status, code, title = 403, "role-too-low", "Role too low"


class NotFound(ApiError):
    """Absent, or another workspace's: the two are told alike."""

    status, code, title = 404, "not-found", "Not found"


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status, code, title = 405, "method-not-allowed", "Method not allowed"


class IllegalState(ApiError):
    """The object's state does not allow this now."""

    status, code, title = 409, "illegal-state", "Illegal state"


class InFlight(ApiError):
    """A request with the same Idempotency-Key is being worked on."""

    status, code, title = 409, "idempotency-key-in-flight", "Request in flight"


class Gone(ApiError):
    """It was here and is not any more; `archive`, when given, is the path of the bundle that has it."""

    status, code, title = 410, "gone", "Gone"

    def __init__(self, detail: str, archive: str | None = None, **extensions: Any) -> None:
        super().__init__(detail, **({} if archive is None else {"archive": archive}), **extensions)
        self.archive = archive

    def headers(self) -> dict[str, str]:
        """Return the link to the bundle (RFC 8288, relation type `archives` of the HTML standard)."""
        return {} if self.archive is None else {"link": f'<{self.archive}>; rel="archives"'}


class BodyTooLarge(ApiError):
    """The body is larger than the service reads."""

    status, code, title = 413, "body-too-large", "Body too large"


class Invalid(ApiError):
    """Well-formed, but a field's value is not acceptable; `field` names it."""

    status, code, title = 422, "invalid", "Invalid request"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}", field=field)


class QuotaExceeded(ApiError):
    """A rate or a cap refuses; `limit` names it and waiting `retry_after_s` suffices for a rate.

    `violated` names all that refuse, when they are several. The problem type is the one that
    draft-ietf-httpapi-ratelimit-headers-11, section 5, registers.
    """

    status, code = 429, "quota-exceeded"
    title = "Request cannot be satisfied as assigned quota has been exceeded"
    type_uri = "https://iana.org/assignments/http-problem-types#quota-exceeded"

    def __init__(
        self,
        limit: str,
        explanation: str,
        retry_after_s: int,
        fields: dict[str, str],
        violated: Sequence[str] = (),
    ) -> None:
        super().__init__(f"Workspace quota exceeded for {limit} {explanation}")
        self.limit = limit
        self.extensions["violated-policies"] = list(violated) or [limit]
        self._headers = {"retry-after": str(retry_after_s), **fields}

    def headers(self) -> dict[str, str]:
        """Return Retry-After and the RateLimit fields."""
        return self._headers


class Unavailable(ApiError):
    """A dependency is down or the process is closing; trying again is right."""

    status, code, title = 503, "unavailable", "Temporarily unavailable"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Return Retry-After."""
        return {"retry-after": str(self.retry_after_s)}


class NotSupported(ApiError):
    """A command that this version names and does not do yet."""

    status, code, title = 501, "not-supported", "Not supported"


PROBLEM_MEDIA_TYPE = "application/problem+json"


def problem(error: ApiError, instance: str) -> bytes:
    """Return the body of an error answer (RFC 9457) for the request path `instance`."""
    return msgspec.json.encode(
        {
            "type": error.type_uri or f"urn:plimsoll:problem:{error.code}",
            "title": error.title,
            "status": error.status,
            "detail": error.detail,
            "instance": instance,
            "error": error.detail,
            **error.extensions,
        }
    )
