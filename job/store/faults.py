"""What an S3 store or the way to it answered, as a sentence with the exit class that fits."""

from __future__ import annotations

from typing import Any, cast

from botocore import exceptions as aws

from job.errors import JobError, NotAllowed, SpecError, Unavailable
from job.store.protocol import Conflict, Missing

# Flipped on the way; the one kind of 400 that sending again can cure.
DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
STRANGER = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "UnrecognizedClientException"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
BUSY = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "IDPCommunicationError"}


def explain(error: Exception, action: str, place: str, endpoint: str, sse: str | None = None) -> JobError:
    """The error for people. `action` is the name in a policy (s3:PutObject), `place` the url of bucket and key, `sse`
    the encryption that was asked for."""
    if isinstance(error, aws.ClientError):
        return _answer(error, action, place, endpoint, sse)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return NotAllowed(
            f"No credentials were found for {place}: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role."
        )
    if isinstance(error, aws.CredentialRetrievalError):
        return Unavailable(f"The credentials for {place} could not be fetched from {error.kwargs.get('provider')}.")
    if isinstance(error, aws.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return SpecError(f"{endpoint} does not speak TLS; should it begin with http://?")
    if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return SpecError(
            f"The certificate of {endpoint} is not trusted; AWS_CA_BUNDLE names a file with the right authority."
        )
    if isinstance(error, aws.ProxyConnectionError):
        return Unavailable(f"The proxy on the way to {endpoint} does not answer; see HTTPS_PROXY and NO_PROXY.")
    if isinstance(error, aws.EndpointConnectionError | aws.ConnectTimeoutError):
        return Unavailable(f"Nothing answers at {endpoint}; is AWS_ENDPOINT_URL_S3 right, and the network open?")
    if isinstance(error, aws.ParamValidationError | aws.InvalidRegionError):
        return SpecError(f"{place} cannot be addressed: {error}")
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename:
        return NotAllowed(
            f"The credentials for {place} need {error.filename}, which cannot be read; see AWS_WEB_IDENTITY_TOKEN_FILE."
        )
    if isinstance(error, aws.BotoCoreError):
        return Unavailable(f"{action} on {place} did not come through after retries: {_first_line(error)}.")
    return Unavailable(f"{action} on {place} broke off after retries: {type(error).__name__} {_first_line(error)}.")


def code_of(error: aws.ClientError) -> tuple[str, int]:
    """The store's own word for an error, and the HTTP status."""
    response = cast(dict[str, Any], error.response)
    return str(response.get("Error", {}).get("Code", "")), int(
        response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )


def _answer(error: aws.ClientError, action: str, place: str, endpoint: str, sse: str | None) -> JobError:
    code, status = code_of(error)
    bucket = "/".join(place.split("/")[:3])
    if error.operation_name.startswith("AssumeRole"):
        said = f"The role for {place} could not be assumed: {error.operation_name} answered {status} {code}"
        if status >= 500 or code in BUSY:
            return Unavailable(f"{said} after retries.")
        return NotAllowed(f"{said}; see AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE and whom the role trusts.")
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
        return NotAllowed(f"The clock of this machine differs too much from that of {endpoint}; set it right.")
    if code.startswith("KMS."):
        return NotAllowed(f"The encryption key cannot be used for {action} on {place} ({code}).")
    if code in ELSEWHERE or status == 301:
        region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", "another")
        return SpecError(f"The bucket {bucket} is in region {region}; set AWS_REGION, or the endpoint of that region.")
    if status in (401, 403):
        return NotAllowed(f"These credentials may not do {action} on {place} ({code or status}).")
    if code in DAMAGED:
        return Unavailable(
            f"{action} on {place} arrived damaged again and again ({code}); something on the way flips bytes."
        )
    if status >= 500 or status == 429 or code in BUSY:
        return Unavailable(f"{endpoint} answered {status} {code} to {action} on {place} after retries.")
    message = error.response.get("Error", {}).get("Message") or ""
    maybe = f" Does it offer encryption {sse}, which output.sse asks for?" if sse and action == "s3:PutObject" else ""
    return SpecError(f"{endpoint} refused {action} on {place}: {status} {code} {message}".rstrip(" .") + f".{maybe}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200].rstrip(".")
