package registry

import (
	"net/http"
	"strconv"
)

// Dialect is what the two ends say to each other beyond the specification. The zero value is the specification alone,
// which is what any registry is spoken to in.
type Dialect struct {
	// Extension is the name below which Server.Extension serves, /v2/<repository>/<Extension>/…; it begins with an
	// underscore.
	Extension string
	// The names of headers, each unless empty. Digest, Size and Source are hints for a new upload session
	// (UploadOptions); Size is also that of a committed blob. Offset is a session's true offset, which Range can't tell
	// when it is 0, and where a chunk of unknown length starts.
	Digest, Size, Source, Offset string
	// KeepTags is the header of PutOptions.KeepTags, with the value true.
	KeepTags string
	// Away is the header of each ErrUnavailable: RetryError.Away, true or false.
	Away string
	// Decorate, unless nil, adds to each request of a Client.
	Decorate func(*http.Request)
	// Check, unless nil, refuses requests to a Server.
	Check func(*http.Request) error
}

// get returns a header, nothing when the dialect has none of this name.
func (Dialect) get(h http.Header, name string) string {
	if name == "" {
		return ""
	}
	return h.Get(name)
}

// hint adds what is known of an upload that starts.
func (d Dialect) hint(h http.Header, o UploadOptions) {
	if d.Digest != "" && o.Digest != "" {
		h.Set(d.Digest, o.Digest.String())
	}
	if d.Size != "" && o.Size >= 0 {
		h.Set(d.Size, strconv.FormatInt(o.Size, 10))
	}
	if d.Source != "" && o.Source != "" {
		h.Set(d.Source, o.Source)
	}
}
