package announce

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"

	"kraken/proto/ring"
)

func request() Request {
	return Request{
		Version: Version,
		Peer:    Peer{ID: strings.Repeat("0a", 20), Addr: []string{"10.0.0.7:16062", "[2001:db8::7]:16062"}, Node: "agent-01"},
		Blobs: []BlobState{
			{Digest: digest.FromString("a"), Repository: "library/app", Event: EventStarted, Left: -1, Want: true, NeedMetainfo: true},
			{Digest: digest.FromString("b"), Size: 5},
		},
	}
}

func TestValidate(t *testing.T) {
	r := request()
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Request)
		want   error
	}{
		"no version":          {func(r *Request) { r.Version = 0 }, ErrInvalid},
		"newer version":       {func(r *Request) { r.Version = 2 }, ErrVersion},
		"too many blobs":      {func(r *Request) { r.Blobs = make([]BlobState, MaxBlobs+1) }, ErrTooLarge},
		"short id":            {func(r *Request) { r.Peer.ID = "0a" }, ErrInvalid},
		"id is no hex":        {func(r *Request) { r.Peer.ID = strings.Repeat("zz", 20) }, ErrInvalid},
		"address is a name":   {func(r *Request) { r.Peer.Addr = []string{"agent-01:1"} }, ErrInvalid},
		"address has no port": {func(r *Request) { r.Peer.Addr = []string{"10.0.0.1:0"} }, ErrInvalid},
		"any address":         {func(r *Request) { r.Peer.Addr = []string{"0.0.0.0:1"} }, ErrInvalid},
		"any address, mapped": {func(r *Request) { r.Peer.Addr = []string{"[::ffff:0.0.0.0]:1"} }, ErrInvalid},
		"multicast":           {func(r *Request) { r.Peer.Addr = []string{"[ff02::1]:1"} }, ErrInvalid},
		"link-local":          {func(r *Request) { r.Peer.Addr = []string{"169.254.169.254:80"} }, ErrInvalid},
		"link-local, mapped":  {func(r *Request) { r.Peer.Addr = []string{"[::ffff:169.254.169.254]:80"} }, ErrInvalid},
		"link-local, IPv6":    {func(r *Request) { r.Peer.Addr = []string{"[fe80::1]:1"} }, ErrInvalid},
		"cloud's metadata":    {func(r *Request) { r.Peer.Addr = []string{"[fd00:ec2::254]:80"} }, ErrInvalid},
		"long key":            {func(r *Request) { r.Peer.Key = strings.Repeat("k", MaxKey+1) }, ErrInvalid},
		"broadcast":           {func(r *Request) { r.Peer.Addr = []string{"255.255.255.255:1"} }, ErrInvalid},
		"zone":                {func(r *Request) { r.Peer.Addr = []string{"[fe80::1%eth0]:1"} }, ErrInvalid},
		"one family twice":    {func(r *Request) { r.Peer.Addr = []string{"10.0.0.1:1", "[::ffff:10.0.0.2]:1"} }, ErrInvalid},
		"three addresses":     {func(r *Request) { r.Peer.Addr = make([]string, 3) }, ErrInvalid},
		"node with a newline": {func(r *Request) { r.Peer.Node = "a\nb" }, ErrInvalid},
		"node is no UTF-8":    {func(r *Request) { r.Peer.Node = "\xff" }, ErrInvalid},
		"long node":           {func(r *Request) { r.Peer.Node = strings.Repeat("n", 256) }, ErrInvalid},
		"digest is a path":    {func(r *Request) { r.Blobs[1].Digest = "sha256:../../etc" }, ErrInvalid},
		"no digest":           {func(r *Request) { r.Blobs[1].Digest = "" }, ErrInvalid},
		"unknown event":       {func(r *Request) { r.Blobs[1].Event = "paused" }, ErrInvalid},
		"long repository":     {func(r *Request) { r.Blobs[1].Repository = strings.Repeat("r", 256) }, ErrInvalid},
		"negative size":       {func(r *Request) { r.Blobs[1].Size = -1 }, ErrInvalid},
		"huge size":           {func(r *Request) { r.Blobs[1].Size = blob.MaxSize + 1 }, ErrInvalid},
		"left below unknown":  {func(r *Request) { r.Blobs[1].Left = -2 }, ErrInvalid},
		"huge left":           {func(r *Request) { r.Blobs[1].Left = blob.MaxSize + 1 }, ErrInvalid},
		"negative counts":     {func(r *Request) { r.Blobs[1].Uploaded = -1 }, ErrInvalid},
	} {
		r := request()
		c.change(&r)
		if err := r.Validate(); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestParseRequest(t *testing.T) {
	body, err := json.Marshal(request())
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRequest(append([]byte(`{"from":"a later minor version",`), body[1:]...))
	if err != nil || !reflect.DeepEqual(got, request()) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{"", "null", "[]", "{", `{"version":1}{}`, `{"version":"1"}`} {
		if _, err := ParseRequest([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: got %v, want ErrInvalid", bad, err)
		}
	}
	if _, err := ParseRequest(make([]byte, MaxBody+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too long a body: %v", err)
	}
}

func FuzzParseRequest(f *testing.F) {
	body, err := json.Marshal(request())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"version":1,"peer":{"id":"00","addr":["[::1%lo]:1"]},"blobs":[{"digest":"sha256:"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := ParseRequest(body)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrTooLarge) {
				t.Fatalf("%v is of no kind", err)
			}
			return
		}
		addrs, err := r.Peer.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range addrs {
			if a.IsValid() && (!Dialable(a) || a.Addr().Is4() != (i == 0)) {
				t.Fatalf("address %d: %v", i, a)
			}
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > MaxBody { // escapes may make the text longer
			return
		}
		if _, err := ParseRequest(again); err != nil {
			t.Fatalf("what passed once is refused: %v", err)
		}
	})
}

func TestClient(t *testing.T) {
	want := Response{Version: Version, Interval: 10 * time.Second, Blobs: []BlobAnswer{{
		Digest: digest.FromString("a"), Metainfo: []byte("d4:info"), Peers: []Peer{{ID: "0b", Addr: []string{"10.0.0.1:1"}, Complete: true}},
		Origins: []ring.Member{{ID: "origin-01", URL: "http://o", Peer: "o:1"}},
	}}}
	var status int
	var body any
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.URL.Path != "/announce" {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		if got, err := ParseRequest(b); err != nil || !reflect.DeepEqual(got, request()) {
			t.Errorf("server got %+v, %v", got, err)
		}
		w.WriteHeader(status)
		if err := json.NewEncoder(w).Encode(body); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	c := NewClient(srv.URL+"/", srv.Client())
	for _, s := range []struct {
		status int
		body   any
		want   error
	}{
		{200, want, nil},
		{200, "no object", ErrUnavailable},
		{200, Response{Version: Version + 1}, ErrVersion},
		{400, "why", ErrRefused},
		{413, "why", ErrRefused},
		{429, "why", ErrUnavailable},
		{503, "why", ErrUnavailable},
	} {
		status, body = s.status, s.body
		got, err := c.Announce(context.Background(), request())
		if !errors.Is(err, s.want) {
			t.Errorf("%d %v: %v, want %v", s.status, s.body, err, s.want)
		}
		if s.want == nil && !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
		if s.status >= 400 && !strings.Contains(err.Error(), "why") {
			t.Errorf("%v does not say why", err)
		}
	}
	if _, err := c.Announce(context.Background(), Request{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("an invalid request was sent: %v", err)
	}
	srv.Close()
	if _, err := c.Announce(context.Background(), request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("nobody there: %v", err)
	}
}
