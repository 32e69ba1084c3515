package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// remoteError is an error of the table with the message that another registry sent.
type remoteError struct {
	kind    *Error
	message string
	coded   bool // the body named the kind's code
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }

// IsAnswer reports whether err is what another registry answered, and not that it could not be asked.
func IsAnswer(err error) bool {
	var e *remoteError
	return errors.As(err, &e)
}

// Says reports whether err is what another registry answered with the code of kind, and not with a status alone, which
// a server in between may have sent.
func Says(err error, kind *Error) bool {
	var e *remoteError
	return errors.As(err, &e) && e.coded && e.kind == kind
}

// decodeError turns a response to a request of an endpoint back into the error that made it.
func (c *Client) decodeError(resp *http.Response, to Endpoint) error {
	var body errorBody
	b, rerr := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	jerr := json.Unmarshal(b, &body)
	var code, message string
	if rerr == nil && jerr == nil && len(body.Errors) > 0 {
		code, message = body.Errors[0].Code, body.Errors[0].Message
	}
	kind := lookup(code, resp.StatusCode, to.kind)
	if code == errPath.Code && resp.StatusCode == errPath.Status && c.o.Dialect.Extension != "" {
		kind = ErrUnsupported // of the path, and not of what is looked for there; what other registries mean is another matter
	}
	if message == "" {
		message = fmt.Sprintf("%s (%s)", kind.Message, resp.Status)
	}
	var err error = &remoteError{kind, message, code == kind.Code}
	switch {
	case kind == ErrUnauthorized:
		return &UnauthorizedError{Err: err, Challenges: ParseChallenges(resp.Header.Values("WWW-Authenticate"))}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && to.kind == "upload":
		if u, ok := c.uploadOf(resp, to, -1); ok {
			return &RangeError{Upload: u, Got: -1}
		}
	}
	if s, perr := strconv.Atoi(resp.Header.Get("Retry-After")); perr == nil && s >= 0 {
		return &RetryError{Err: err, After: time.Duration(s) * time.Second}
	}
	return err
}

// unknown is what a bare 404 means for each kind of route.
var unknown = map[string]*Error{
	"manifest": ErrManifestUnknown, "referrers": ErrManifestUnknown, "tags": ErrNameUnknown, "catalog": ErrNameUnknown, "uploads": ErrNameUnknown,
	"upload": ErrBlobUploadUnknown,
}

// lookup finds the error of a code and a status, of the status alone where a registry names no code of the table, or
// has no body, as HEAD.
func lookup(code string, status int, route string) *Error {
	for _, e := range table {
		if e.Code == code && e.Status == status {
			return e
		}
	}
	if e := unknown[route]; e != nil && status == http.StatusNotFound {
		return e
	}
	if status >= 500 && status != http.StatusInsufficientStorage && status != http.StatusInternalServerError {
		return ErrUnavailable
	}
	for _, e := range table {
		if e.Status == status {
			return e
		}
	}
	return ErrInternal
}
