// Command dex is the issuer of OIDC ID tokens of that name, for tests: one client, one user, and keys that live in its
// memory, so that it has others after each start. dex' own command is not taken: it wants databases to be built.
package main

import (
	"context"
	"errors"
	"flag"
	"log"
	"net"
	"net/http"
	"os/signal"
	"syscall"

	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/memory"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

func main() {
	issuer := flag.String("issuer", "", "URL that tokens name, such as http://127.0.0.1:5556/dex")
	listen := flag.String("listen", "", "address, such as 127.0.0.1:5556")
	web := flag.String("web", "", "folder with dex' templates")
	client := storage.Client{RedirectURIs: []string{""}}
	flag.StringVar(&client.ID, "client", "", "id of the client, the audience of its tokens")
	flag.StringVar(&client.Secret, "secret", "", "secret of the client")
	flag.StringVar(&client.RedirectURIs[0], "redirect", "", "where the client gets its codes")
	email := flag.String("email", "", "the user's address")
	hash := flag.String("hash", "", "the user's password, as bcrypt")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	l := logrus.New()
	s := storage.WithStaticClients(memory.New(l), []storage.Client{client})
	s = storage.WithStaticPasswords(s, []storage.Password{{Email: *email, Hash: []byte(*hash), Username: "tester", UserID: "1"}}, l)
	s = storage.WithStaticConnectors(s, []storage.Connector{{ID: server.LocalConnector, Name: "Email", Type: server.LocalConnector}})
	h, err := server.NewServer(ctx, server.Config{
		Issuer: *issuer, Storage: s, SkipApprovalScreen: true, Web: server.WebConfig{Dir: *web}, Logger: l, PrometheusRegistry: prometheus.NewRegistry(),
	})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	hs := &http.Server{Handler: h}
	go func() {
		<-ctx.Done()
		_ = hs.Close()
	}()
	if err := hs.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}
