package login

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"kraken/proto/audit"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// writer is a registry whose pushes end as a test says, and which has every session.
type writer struct {
	manifests
	registry.Uploads
	put func(context.Context, registry.PutOptions) (registry.PutResult, error)
}

func (w writer) PutManifest(ctx context.Context, _ string, _ registry.Reference, _ string, _ []byte, o registry.PutOptions) (registry.PutResult, error) {
	return w.put(ctx, o)
}

func (w writer) DeleteManifest(ctx context.Context, _ string, _ registry.Reference) error {
	_, err := w.put(ctx, registry.PutOptions{})
	return err
}

func (w writer) StartUpload(ctx context.Context, _ string, _ registry.UploadOptions) (registry.Upload, error) {
	_, err := w.put(ctx, registry.PutOptions{})
	return registry.Upload{ID: "00000000-0000-4000-8000-000000000000"}, err
}

// events does requests as ann, one after the other, and returns what the audit has of them.
func (r *rig) events(w writer, requests ...string) (out []audit.Event) {
	r.Helper()
	s := registry.Server{Access: r.door, Namer: cluster.NewNamer([]string{"registry.corp"}), Manifests: w, ManifestWriter: w, Uploads: w, Dialect: cluster.Dialect()}
	h := r.door.Audited(s.Handler())
	before, _ := os.ReadFile(r.path("audit.jsonl")) // none yet is nothing
	for _, request := range requests {
		ctx, cancel := context.WithCancel(r.Context())
		method, target, _ := strings.Cut(request, " ")
		q := httptest.NewRequest(method, target, strings.NewReader("{}")).WithContext(context.WithValue(ctx, hangUp{}, cancel))
		q.Header.Set("Authorization", basic("ann", "ann-secret"))
		q.Header.Set("X-Request-Id", "theirs")
		func() {
			defer cancel()
			defer func() {
				if v := recover(); v != nil && v != http.ErrAbortHandler {
					r.Error(v)
				}
			}()
			h.ServeHTTP(httptest.NewRecorder(), q)
		}()
	}
	b, err := os.ReadFile(r.path("audit.jsonl"))
	if err != nil {
		r.Fatal(err)
	}
	for line := range strings.Lines(string(b[len(before):])) {
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			r.Fatal(err)
		}
		if e.RequestID == "" || e.RequestID == "theirs" || e.ClientRequestID != "theirs" {
			r.Errorf("a request is called %q, by its client %q", e.RequestID, e.ClientRequestID)
		}
		out = append(out, e)
	}
	return out
}

type hangUp struct{}

// What was changed is in the audit by the names that mean it, tags and all.
func TestAuditOfWhatWasServed(t *testing.T) {
	r := newRig(t)
	done := writer{put: func(_ context.Context, o registry.PutOptions) (registry.PutResult, error) {
		return registry.PutResult{Digest: "sha256:" + digestHex, Tags: o.Tags}, nil
	}}
	byDigest := "/manifests/sha256:" + digestHex + "?tag=prod&tag=latest"
	got := r.events(done, "PUT /v2/team/app"+byDigest, "PUT /v2/registry.corp/team/app"+byDigest, "PUT /v2/team/app"+byDigest+"&ns=registry.corp", "DELETE /v2/registry.corp/team/app/manifests/v1")
	if len(got) != 4 {
		t.Fatalf("%d lines: %+v", len(got), got)
	}
	for i, e := range got {
		want := []string{"prod", "latest"}
		if i == 3 {
			want = nil
		}
		if e.Repository != "team/app" || !slices.Equal(e.Tags, want) || e.Outcome != "" || e.Event != audit.Change || (e.Digest == "") != (i == 3) {
			t.Errorf("%+v", e)
		}
	}
}

// What may have been changed, with nobody there to be told, is in the audit as that; what can't have been is not.
func TestAuditOfWhatIsNotKnown(t *testing.T) {
	r := newRig(t)
	ends := map[string]func(context.Context) error{
		"the client went away": func(ctx context.Context) error {
			ctx.Value(hangUp{}).(context.CancelFunc)()
			return context.Cause(ctx)
		},
		"build-index went away": func(context.Context) error { return fmt.Errorf("%w: gone", registry.ErrUnavailable) },
		"a fault":               func(context.Context) error { return fmt.Errorf("a fault") },
	}
	for name, end := range ends {
		w := writer{put: func(ctx context.Context, _ registry.PutOptions) (registry.PutResult, error) {
			return registry.PutResult{}, end(ctx)
		}}
		got := r.events(w, "PUT /v2/team/app/manifests/sha256:"+digestHex+"?tag=prod", "DELETE /v2/team/app/manifests/v1", "POST /v2/team/app/blobs/uploads/?digest=sha256:"+digestHex,
			"POST /v2/team/app/blobs/uploads/", "GET /v2/team/app/manifests/v1", "PUT /v2/other/manifests/v1")
		if len(got) != 4 {
			t.Errorf("%s: %d lines: %+v", name, len(got), got)
			continue
		}
		for i, e := range got[:3] {
			if e.Event != audit.Change || e.Outcome != audit.OutcomeUnknown || e.Repository != "team/app" || e.Subject != "ann" || (i == 0) != slices.Equal(e.Tags, []string{"prod"}) {
				t.Errorf("%s: %+v", name, e)
			}
		}
		if got[3].Event != audit.Refused {
			t.Errorf("%s: %+v", name, got[3])
		}
	}
	refuses := writer{put: func(context.Context, registry.PutOptions) (registry.PutResult, error) {
		return registry.PutResult{}, registry.ErrManifestInvalid
	}}
	if got := r.events(refuses, "PUT /v2/team/app/manifests/v1"); len(got) != 0 {
		t.Errorf("a push that was no good: %+v", got)
	}
}
