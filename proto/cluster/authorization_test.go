package cluster

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// What a runtime presents reaches another role's context, and leaves this machine over TLS alone.
func TestAuthorizationIsCarried(t *testing.T) {
	var got, header string
	srv := httptest.NewServer(CarryAuthorization(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, header = Authorization(r.Context()), r.Header.Get(AuthorizationHeader)
		w.WriteHeader(http.StatusNoContent)
	})))
	defer srv.Close()
	c, err := NewIndexClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x")
	for _, value := range []string{"", "Basic dTpw"} {
		if err := c.Granted(WithAuthorization(t.Context(), value), "docker.io/a/b", d); err != nil || got != value || header != "" {
			t.Errorf("%q: %q, %q, %v", value, got, header, err)
		}
	}
	if err := c.Granted(WithAuthorization(t.Context(), "Basic "+strings.Repeat("x", maxAuthorization)), "docker.io/a/b", d); err != nil || got != "" {
		t.Errorf("too long: %d bytes, %v", len(got), err)
	}
	for url, want := range map[string]bool{
		"https://index.example/v2/": true, "http://index.example/v2/": false, "http://10.0.0.1:16010/v2/": false, "http://127.0.0.1:1/v2/": true, "http://[::1]/v2/": true,
		"http://localhost:5/v2/": true, "http://localhost.example/v2/": false,
	} {
		r := httptest.NewRequest(http.MethodGet, url, nil)
		carry(r.WithContext(WithAuthorization(r.Context(), "Basic dTpw")))
		if has := r.Header.Get(AuthorizationHeader) != ""; has != want {
			t.Errorf("%s: %v", url, has)
		}
	}
}
