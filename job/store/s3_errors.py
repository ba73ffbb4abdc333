"""Translates an answer of an S3 store, or of the network in between, into a sentence with the exit class that fits."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlsplit

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from job.errors import JobError, NotAllowed, SpecError, Unavailable
from job.store.protocol import Conflict, Missing

BROKEN = (aws.BotoCoreError, aws.ClientError, HTTPError, aws.HTTPClientError, ResponseParserError, OSError)
"""What a request raises when it fails."""
# Bytes flipped in transit: the only kind of 400 that sending again can cure.
DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
STRANGER = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "UnrecognizedClientException"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
BUSY = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "IDPCommunicationError"}
REDIRECTS = (301, 302, 303, 307, 308)


def explain(error: Exception, action: str, place: str, endpoint: str, sse: str | None = None) -> JobError:
    """Return the error for people. `action` is the name in a policy (s3:PutObject), `place` the URL of bucket and key, `sse`
    the requested encryption."""
    if isinstance(error, aws.ClientError):
        return _answer(error, action, place, endpoint, sse)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return NotAllowed(
            f"No credentials were found for {place}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role."
        )
    if isinstance(error, aws.CredentialRetrievalError):
        return Unavailable(f"The credentials for {place} could not be fetched from {error.kwargs.get('provider')}.")
    if isinstance(error, aws.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return SpecError(f"{endpoint} does not speak TLS; should it begin with http://?")
    if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return SpecError(
            f"The certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE to a file with its authority."
        )
    if isinstance(error, aws.SSLError) and "No such file" in str(error):
        return SpecError(f"The file that AWS_CA_BUNDLE names for {endpoint} does not exist.")
    if isinstance(error, aws.ProxyConnectionError):
        return Unavailable(f"The proxy for {endpoint} does not answer; check HTTPS_PROXY and NO_PROXY.")
    if isinstance(error, aws.EndpointConnectionError | aws.ConnectTimeoutError):
        return Unavailable(f"Nothing answers at {endpoint}; check AWS_ENDPOINT_URL_S3 and the network.")
    if isinstance(error, aws.ParamValidationError | aws.InvalidRegionError):
        return SpecError(f"{place} is not a valid address: {error}")
    if isinstance(error, aws.EndpointProviderError):
        return SpecError(f"{endpoint} is not a store endpoint ({_first_line(error)}); check AWS_ENDPOINT_URL_S3.")
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename:
        return NotAllowed(
            f"The credentials for {place} need {error.filename}, which cannot be read; check AWS_WEB_IDENTITY_TOKEN_FILE."
        )
    if isinstance(error, aws.ConnectionClosedError) and action == "s3:PutObject":
        return Unavailable(
            f"{endpoint} closed the connection, or accepted no data, in {action} on {place}, after retries; check "
            "network and store."
        )
    if isinstance(error, ResponseParserError):
        return page_instead(200, action, endpoint)
    if isinstance(error, aws.BotoCoreError):
        return Unavailable(f"{action} on {place} failed after retries: {_first_line(error)}.")
    return Unavailable(f"{action} on {place} failed after retries: {type(error).__name__} {_first_line(error)}.")


def code_of(error: aws.ClientError) -> tuple[str, int]:
    """Return the store's own error code, and the HTTP status."""
    response = cast(dict[str, Any], error.response)
    return str(response.get("Error", {}).get("Code", "")), int(
        response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )


def _answer(error: aws.ClientError, action: str, place: str, endpoint: str, sse: str | None) -> JobError:
    code, status = code_of(error)
    answer = cast(dict[str, Any], error.response)
    headers = _headers(answer)
    bucket = "/".join(place.split("/")[:3])
    if error.operation_name.startswith("AssumeRole"):
        said = f"The role for {place} could not be assumed: {error.operation_name} answered {status} {code}"
        if status >= 500 or code in BUSY:
            return Unavailable(f"{said} after retries.")
        return NotAllowed(f"{said}; check AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE and the role's trust policy.")
    if is_page(answer):
        return page_instead(status, action, endpoint)
    if code == "NoSuchBucket":
        return SpecError(f"There is no bucket {bucket} at {endpoint}.")
    if code in ("NoSuchKey", "NotFound", "404"):
        return Missing(f"There is no {place} at {endpoint}.")
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
        return Conflict(f"Another writer changed {place}.")
    if code in EXPIRED:
        return NotAllowed(f"The credentials expired before {action} on {place} ({code}); renew them and run again.")
    if code in STRANGER:
        return NotAllowed(f"{endpoint} does not accept these credentials ({code}): a wrong key, secret or endpoint.")
    if code == "RequestTimeTooSkewed":
        return NotAllowed(f"The clock of this machine differs too much from that of {endpoint}; correct it.")
    if code.startswith("KMS."):
        return NotAllowed(f"The encryption key cannot be used for {action} on {place} ({code}).")
    if code in ELSEWHERE or status in REDIRECTS or (status == 400 and "x-amz-bucket-region" in headers):
        return _elsewhere(headers, bucket, endpoint)
    if status in (401, 403):
        return NotAllowed(f"These credentials do not allow {action} on {place} ({code or status}).")
    if code in DAMAGED:
        return Unavailable(f"The data of {action} on {place} repeatedly arrived damaged ({code}); check the network.")
    if status in (405, 501):
        return SpecError(
            f"{endpoint} does not offer {action} ({status} {code}), which this job needs; use another store."
        )
    if status in (407, 411):
        return _by_proxy(status, endpoint)
    if status >= 500 or status in (409, 429) or code in BUSY:
        asks = "; it asks for fewer requests: run fewer jobs on it at once" if status in (429, 503) else ""
        return Unavailable(f"{endpoint} answered {status} {code} to {action} on {place} after retries{asks}.")
    if code == "400":  # the answer to a HEAD has no body
        return SpecError(
            f"{endpoint} refused {action} on {place} with 400 and no reason; usually AWS_REGION is not the bucket's, or the "
            "object is encrypted with a key that the store does not have."
        )
    message = error.response.get("Error", {}).get("Message") or ""
    maybe = f" Does it offer encryption {sse}, which output.sse asks for?" if sse and action == "s3:PutObject" else ""
    return SpecError(f"{endpoint} refused {action} on {place}: {status} {code} {message}".rstrip(" .") + f".{maybe}")


def is_page(answer: dict[str, Any]) -> bool:
    """Return whether an answer is a web page. No S3 store sends one by itself: they all mark their answers with their own
    headers."""
    headers = _headers(answer)
    code = str(answer.get("Error", {}).get("Code", ""))
    unmarked = not any(name.startswith("x-amz") for name in headers) and (not code or code.isdigit())
    return unmarked and headers.get("content-type", "").startswith("text/html")


def page_instead(status: int, action: str, endpoint: str) -> JobError:
    said = f"{endpoint} answered {action} with a web page instead of an S3 response: "
    if status in (401, 403, 407):
        return NotAllowed(f"{said}a proxy refuses it; check HTTPS_PROXY and NO_PROXY, or AWS_ENDPOINT_URL_S3.")
    if 400 <= status < 500 and status != 429:
        return SpecError(f"{said}AWS_ENDPOINT_URL_S3 names a web site or a console, or a proxy answers for it.")
    return Unavailable(
        f"{said}a proxy or login page answers for it, or AWS_ENDPOINT_URL_S3 names a console; sign in, or check NO_PROXY."
    )


def _headers(answer: dict[str, Any]) -> dict[str, str]:
    return cast(dict[str, str], answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}))


def _elsewhere(headers: dict[str, str], bucket: str, endpoint: str) -> JobError:
    """Explain a redirect: from the store to another region, or from something on the way to somewhere else altogether."""
    target = urlsplit(headers.get("location", ""))
    here = urlsplit(endpoint)
    if target.hostname == here.hostname and target.scheme == "https" and here.scheme == "http":
        return SpecError(f"{endpoint} needs https; start AWS_ENDPOINT_URL_S3 with https://.")
    if target.hostname and not any(name.startswith("x-amz") for name in headers):
        return Unavailable(
            f"{endpoint} redirects to {target.hostname}: it is not an S3 store, or a proxy or login page answers; check NO_PROXY."
        )
    region = headers.get("x-amz-bucket-region", "another")
    return SpecError(f"The bucket {bucket} is in region {region}; set AWS_REGION, or the endpoint of that region.")


def _by_proxy(status: int, endpoint: str) -> JobError:
    if status == 407:
        return NotAllowed(f"The proxy for {endpoint} requires credentials; check HTTPS_PROXY and NO_PROXY.")
    return SpecError(
        f"{endpoint} received no Content-Length, which a proxy must have removed; add the endpoint to NO_PROXY."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200].rstrip(".")
