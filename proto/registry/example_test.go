package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
)

// one is a registry of one blob: the smallest that can be read.
type one struct{ content []byte }

func (o one) StatBlob(_ context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if d != digest.FromBytes(o.content) {
		return v1.Descriptor{}, fmt.Errorf("%w: %s in %s", registry.ErrBlobUnknown, d, repo)
	}
	return v1.Descriptor{Digest: d, Size: int64(len(o.content))}, nil
}

func (o one) OpenBlob(ctx context.Context, repo string, d digest.Digest, _ registry.Range) (*registry.Content, error) {
	desc, err := o.StatBlob(ctx, repo, d)
	if err != nil {
		return nil, err
	}
	return &registry.Content{Digest: d, Size: desc.Size, Body: bytes.NewReader(o.content), Close: func() error { return nil }}, nil
}

// A Server answers for the parts that it is given; the others are 405.
func ExampleServer() {
	handler := registry.Server{Blobs: one{[]byte("hello")}}.Handler()
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/demo/app/blobs/"+digest.FromString("hello").String(), nil))
	fmt.Println(w.Code, w.Body)
	w = httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/v2/demo/app/blobs/uploads/", nil))
	fmt.Println(w.Code, w.Header().Get("Allow"))
	// Output:
	// 200 hello
	// 405 OPTIONS
}

// A Client implements the same interfaces over HTTP, so a Server over a Client is a proxy.
func ExampleClient() {
	upstream := httptest.NewServer(registry.Server{Blobs: one{[]byte("hello")}}.Handler())
	defer upstream.Close()
	client, err := registry.NewClient(upstream.URL, http.DefaultClient)
	if err != nil {
		log.Fatal(err)
	}
	proxy := httptest.NewServer(registry.Server{Blobs: client}.Handler())
	defer proxy.Close()
	client, err = registry.NewClient(proxy.URL, http.DefaultClient)
	if err != nil {
		log.Fatal(err)
	}
	content, err := client.OpenBlob(context.Background(), "demo/app", digest.FromString("hello"), registry.Whole)
	if err != nil {
		log.Fatal(err)
	}
	defer content.Close()
	b, err := io.ReadAll(content.Body)
	fmt.Printf("%s %v\n", b, err)
	// Output: hello <nil>
}
