package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// rights is an Access by table: "repository action" that the user of the header User may do. Who has no name is
// challenged.
type rights struct {
	may   map[string][]string
	asked *[]string
}

type userKey struct{}

func (a rights) Allow(r *http.Request, repository string, action Action) (context.Context, error) {
	user := r.Header.Get("User")
	*a.asked = append(*a.asked, fmt.Sprintf("%s %s", repository, action))
	ctx := context.WithValue(r.Context(), userKey{}, user)
	switch {
	case a.May(ctx, repository, action):
		return ctx, nil
	case user == "":
		return nil, &ChallengeError{Challenges: []string{`Bearer realm="https://r/token"`, `Basic realm="r"`}}
	}
	return nil, fmt.Errorf("%w: %s may not %s", ErrDenied, user, action)
}

func (a rights) May(ctx context.Context, repository string, action Action) bool {
	user, _ := ctx.Value(userKey{}).(string)
	return slices.Contains(a.may[user], fmt.Sprintf("%s %s", repository, action))
}

func controlled(m *memory, may map[string][]string) (http.Handler, *[]string) {
	var asked []string
	s := m.server()
	s.Access = rights{may, &asked}
	return s.Handler(), &asked
}

func do(h http.Handler, user, method, target string, body []byte, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, bytes.NewReader(body))
	r.Header.Set("User", user)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// Each kind of route asks for one action at one repository, after the name and the method were found good.
func TestAccessAsksByRoute(t *testing.T) {
	d := digest.FromString("hello").String()
	for _, c := range []struct{ method, path, want string }{
		{"GET", "/v2/", " "},
		{"GET", "/v2/_catalog", " catalog"},
		{"GET", "/v2/a/b/tags/list", "a/b pull"},
		{"GET", "/v2/a/referrers/" + d, "a pull"},
		{"HEAD", "/v2/a/manifests/x", "a pull"},
		{"PUT", "/v2/a/manifests/x", "a push"},
		{"DELETE", "/v2/a/manifests/x", "a delete"},
		{"GET", "/v2/a/blobs/" + d, "a pull"},
		{"DELETE", "/v2/a/blobs/" + d, "a delete"},
		{"POST", "/v2/a/blobs/uploads/", "a push"},
		{"GET", "/v2/a/blobs/uploads/u", "a push"},
		{"PATCH", "/v2/a/blobs/uploads/u", "a push"},
		{"PUT", "/v2/a/blobs/uploads/u?digest=" + d, "a push"},
		{"DELETE", "/v2/a/blobs/uploads/u", "a push"},
		{"GET", "/v2/A/tags/list", ""},
		{"POST", "/v2/a/tags/list", ""},
		{"OPTIONS", "/v2/a/tags/list", ""},
		{"GET", "/v2/a/nothing", ""},
	} {
		h, asked := controlled(newMemory(), nil)
		w := do(h, "", c.method, c.path, nil)
		if got := strings.Join(*asked, ", "); got != c.want {
			t.Errorf("%s %s asked for %q, want %q", c.method, c.path, got, c.want)
		}
		if c.want == "" {
			continue
		}
		if got := w.Header().Values("WWW-Authenticate"); w.Code != http.StatusUnauthorized || len(got) != 2 {
			t.Errorf("%s %s: %d with challenges %q", c.method, c.path, w.Code, got)
		}
		if w := do(h, "eve", c.method, c.path, nil); w.Code != http.StatusForbidden || c.method != "HEAD" && !strings.Contains(w.Body.String(), `"DENIED"`) {
			t.Errorf("%s %s of eve: %d %s", c.method, c.path, w.Code, w.Body)
		}
	}
}

// A catalog has the repositories that the caller may pull, in full pages.
func TestAccessFiltersCatalog(t *testing.T) {
	m := newMemory()
	may := map[string][]string{"ann": {" catalog"}}
	for i := range 30 {
		repo := fmt.Sprintf("r%02d", i)
		m.tags[repo] = map[string]digest.Digest{"x": digest.FromString("x")}
		if i%7 == 0 {
			may["ann"] = append(may["ann"], repo+" pull")
		}
	}
	h, _ := controlled(m, may)
	var got []string
	for at := "/v2/_catalog?n=2"; at != ""; {
		w := do(h, "ann", "GET", at, nil)
		var l repositoryList
		if err := json.Unmarshal(w.Body.Bytes(), &l); err != nil || len(l.Repositories) > 2 {
			t.Fatal(w.Body, err)
		}
		got = append(got, l.Repositories...)
		at, _, _ = strings.Cut(strings.TrimPrefix(w.Header().Get("Link"), "<"), ">")
	}
	if want := []string{"r00", "r07", "r14", "r21", "r28"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Who may push and not overwrite makes tags and moves none; to push again what is there is fine.
func TestAccessKeepsTags(t *testing.T) {
	m := newMemory()
	h, _ := controlled(m, map[string][]string{"ci": {"a push"}, "lead": {"a push", "a overwrite"}})
	one, two := []byte(`{"schemaVersion":2,"config":{}}`), []byte(`{"schemaVersion":2,"config":{},"layers":[]}`)
	for _, c := range []struct {
		user string
		body []byte
		want int
	}{
		{"ci", one, 201}, {"ci", one, 201}, {"ci", two, 403}, {"lead", two, 201}, {"ci", one, 403},
	} {
		w := do(h, c.user, "PUT", "/v2/a/manifests/x", c.body, "Content-Type", v1.MediaTypeImageManifest)
		if w.Code != c.want {
			t.Errorf("%s pushes %d bytes: %d %s, want %d", c.user, len(c.body), w.Code, w.Body, c.want)
		}
		if c.want == 403 && !strings.Contains(w.Body.String(), "may not overwrite") {
			t.Errorf("refused with %s", w.Body)
		}
	}
	c, err := NewClient("http://127.0.0.1:1", http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.PutManifest(t.Context(), "a", Reference{Tag: "x"}, "", one, PutOptions{KeepTags: true}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a registry that can't be asked to keep tags: %v", err)
	}
}

// Without control everybody may do everything.
func TestMayWithoutControl(t *testing.T) {
	if !May(t.Context(), "a", ActionDelete) || Controlled(t.Context()) {
		t.Error("access is controlled where nobody does")
	}
}
